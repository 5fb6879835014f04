"""The tuner of sublayer steering."""

from ..steering.model import SteeringModel
from .layer import SublayerSteeringLayer


class SublayerSteeringModel(SteeringModel):
    """
    Adds a learned update at a sublayer of every transformer block of a frozen model: to the input or the output of the
    MLP, or to the output of the attention. An update without an activation can be merged into the linear layers there.

    Reference: the ablation of sites in "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 4.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`SublayerSteeringConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import SublayerSteeringConfig

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, SublayerSteeringConfig(site="post_mlp", r=8, task_type="CAUSAL_LM"))
        ```
    """

    steering_layer_cls = tuner_layer_cls = SublayerSteeringLayer
