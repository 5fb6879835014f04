"""Configuration of LoReFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from peft.utils import PeftType

from trl_steer.choices import LoReftSite, first_and_last

from ..steering.config import (
    SteeringConfig,
    check_activation,
    check_bool,
    check_choice,
    check_dropout,
    check_rank,
)


@dataclass
class LoReftConfig(SteeringConfig):
    """
    Configuration of a [`LoReftModel`]: `h' = dropout(h + R^T (act(W h + b) - R h))`, where the rows of `R` are
    orthonormal.

    References: "ReFT: Representation Finetuning for Language Models" (arXiv 2404.03592), equation 2; a baseline in
    "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 6.

    Args:
        r (`int`, defaults to `8`):
            The rank: number of rows of `R` and `W`. At most the hidden size.
        site (`str`, defaults to `"post_block"`):
            - `"post_block"`: the output of the block, which is where pyreft's scripts put it;
            - `"post_mlp"`: the output of the MLP, as it is added to the residual stream, as in arXiv 2603.00425.
        activation (`str`, *optional*):
            Name of a transformers activation for `W h + b`. Default: the identity.
        dropout (`float`, defaults to `0.0`):
            Dropout probability. It acts on the whole edited hidden state.
        share_weights (`bool`, defaults to `True`):
            Whether the first and the last tokens of the prompt share one `R`, `W` and `b`. `False` needs
            `positions="fn+ln"`.
        kwargs: The fields of [`SteeringConfig`]: `positions`, `scaling`, `target_modules`, ...

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    r: int = field(default=8, metadata={"help": "Rank: number of rows of R and W."})
    site: LoReftSite = field(
        default="post_block", metadata={"help": "Where in the block: 'post_block' or 'post_mlp'."}
    )
    activation: str | None = field(
        default=None, metadata={"help": "Name of a transformers activation for W h + b. Default: the identity."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the edited hidden state."})
    share_weights: bool = field(
        default=True, metadata={"help": "Whether the first and the last tokens of the prompt share their weights."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["LOREFT"]  # added by trl_steer.registration
        check_rank(self.r)
        check_activation(self.activation)
        check_dropout(self.dropout)
        check_choice("site", self.site, get_args(LoReftSite))
        check_bool("share_weights", self.share_weights)
        if not self.share_weights and not first_and_last(self.positions):
            raise ValueError(
                f"share_weights=False needs first and last tokens that are edited, but got "
                f"positions={self.positions!r}. Use for example positions='f7+l7'."
            )

    def card_fields(self):
        weights = None if self.share_weights else "separate for first and last tokens"
        return {"rank": self.r, "activation": self.activation, "weights": weights, **super().card_fields()}
