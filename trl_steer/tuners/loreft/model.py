"""The tuner of LoReFT."""

from ..steering.model import SteeringModel
from .layer import LoReftLayer


class LoReftModel(SteeringModel):
    """
    Edits the output of every transformer block, or of its MLP, in a learned low-rank subspace.

    Reference: "ReFT: Representation Finetuning for Language Models" (arXiv 2404.03592).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`LoReftConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import LoReftConfig

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, LoReftConfig(r=8, positions="f7+l7", task_type="CAUSAL_LM"))
        ```
    """

    steering_layer_cls = tuner_layer_cls = LoReftLayer
