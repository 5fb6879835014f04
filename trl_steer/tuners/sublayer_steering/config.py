"""Configuration of sublayer steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from peft.utils import PeftType

from trl_steer.choices import SublayerSite

from ..post_block_steering.config import AdditiveSteeringConfig
from ..steering.config import check_choice


@dataclass
class SublayerSteeringConfig(AdditiveSteeringConfig):
    """
    Configuration of a [`SublayerSteeringModel`]: the update of post-block steering at a sublayer of every block. See
    [`AdditiveSteeringConfig`] for the update and [`SteeringConfig`] for the choice of blocks.

    Reference: the ablation of sites in "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 4.

    Args:
        site (`str`, defaults to `"post_mlp"`):
            - `"pre_mlp"`: the input of the MLP;
            - `"post_mlp"`: the output of the MLP, as it is added to the residual stream;
            - `"post_attn"`: the output of the attention, as it is added to the residual stream.

            If there is a norm between a sublayer and the residual addition (Gemma 2 and 3, OLMo 2), the last two are
            after the norm.
        kwargs: The fields of [`AdditiveSteeringConfig`] and [`SteeringConfig`].

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    site: SublayerSite = field(
        default="post_mlp", metadata={"help": "Where in the block: 'pre_mlp', 'post_mlp' or 'post_attn'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["SUBLAYER_STEERING"]  # added by trl_steer.registration
        check_choice("site", self.site, get_args(SublayerSite))
