"""The tuner of JoLA."""

from ..steering.model import SteeringModel
from .layer import JolaLayer


class JolaModel(SteeringModel):
    """
    Multiplies the output of attention heads of a frozen model by a factor and adds an offset to it, before the
    attention's output projection, each behind a gate that is learned for each head. In evaluation gates are fixed, and
    the update merges exactly into that projection, where it has a bias.

    The gates have a penalty, which training adds if [`PenaltyCallback`] is among the callbacks of the trainer.

    Reference: "Joint Localization and Activation Editing for Low-Resource Fine-Tuning" (arXiv 2502.01179).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`JolaConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import JolaConfig, PenaltyCallback
        >>> from trl import SFTTrainer

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, JolaConfig(task_type="CAUSAL_LM"))
        >>> SFTTrainer(model, train_dataset=dataset, callbacks=[PenaltyCallback()]).train()
        ```
    """

    steering_layer_cls = tuner_layer_cls = JolaLayer
