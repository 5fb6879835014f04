"""The tuner of LoFiT."""

from ..steering.model import SteeringModel
from .layer import LofitLayer


class LofitModel(SteeringModel):
    """
    Adds an offset to the output of attention heads of a frozen model, before the attention's output projection. It
    merges exactly into the bias of that projection, where the model has one.

    Its first phase, `LofitConfig(phase="scale")`, has a penalty, which training adds if [`PenaltyCallback`] is among
    the callbacks of the trainer.

    Reference: "LoFiT: Localized Fine-tuning on LLM Representations" (arXiv 2406.01563).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`LofitConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import LofitConfig, PenaltyCallback, top_heads
        >>> from trl import SFTTrainer

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, LofitConfig(phase="scale", task_type="CAUSAL_LM"))
        >>> SFTTrainer(model, train_dataset=dataset, callbacks=[PenaltyCallback()]).train()
        >>> heads = top_heads(model, k=51)

        >>> model = get_peft_model(model.unload(), LofitConfig(heads=heads, task_type="CAUSAL_LM"))
        >>> SFTTrainer(model, train_dataset=dataset).train()
        ```
    """

    steering_layer_cls = tuner_layer_cls = LofitLayer
