"""Configuration of sublayer steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.utils import PeftType

from ..post_block_steering.config import AdditiveSteeringConfig

SUBLAYER_SITES = ("pre_mlp", "post_mlp", "post_attn")


@dataclass
class SublayerSteeringConfig(AdditiveSteeringConfig):
    """
    Configuration of a [`SublayerSteeringModel`]: the update of post-block steering at another place in every block.
    See [`AdditiveSteeringConfig`] for the update and [`SteeringConfig`] for the choice of blocks.

    Reference: the ablation of sites in "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 4.

    Args:
        site (`str`, defaults to `"post_mlp"`):
            - `"pre_mlp"`: the input of the MLP;
            - `"post_mlp"`: the MLP's output, as it is added to the residual stream;
            - `"post_attn"`: the attention's output, as it is added to the residual stream.

            Where a norm sits between a sublayer and the residual addition (Gemma 2 and 3, OLMo 2), the last two are
            behind it.
        kwargs: The fields of [`AdditiveSteeringConfig`] and [`SteeringConfig`].

    Raises:
        ValueError: A field has a value that it cannot have; the message says which are allowed.
        TypeError: A field has a value of the wrong type.
    """

    site: Literal["pre_mlp", "post_mlp", "post_attn"] = field(
        default="post_mlp", metadata={"help": "Where in the block: 'pre_mlp', 'post_mlp' or 'post_attn'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["SUBLAYER_STEERING"]  # ours, see trl_steer.registration
        if self.site not in SUBLAYER_SITES:
            raise ValueError(f"site={self.site!r} is unknown; use one of {SUBLAYER_SITES}.")
