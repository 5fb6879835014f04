"""The tuner of post-block steering."""

from ..steering.model import SteeringModel
from .layer import PostBlockSteeringLayer


class PostBlockSteeringModel(SteeringModel):
    """
    Adds a learned update to the output of every transformer block of a frozen model: `h + scaling * update(h)`, with
    the update of [`AdditiveSteeringConfig`].

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.1.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`PostBlockSteeringConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import PostBlockSteeringConfig

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, PostBlockSteeringConfig(r=8, task_type="CAUSAL_LM"))
        >>> model.print_trainable_parameters()
        ```
    """

    steering_layer_cls = tuner_layer_cls = PostBlockSteeringLayer
