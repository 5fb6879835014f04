"""Configuration of post-block steering, and the fields that it shares with sublayer steering."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from trl_steer.choices import SteeringType

from ..steering.config import SteeringConfig, check_activation, check_choice, check_dropout, check_number, check_rank
from ..steering.sites import Site


@dataclass
class AdditiveSteeringConfig(SteeringConfig):
    """
    Configuration of an update that is added to a hidden state `h` (batch, sequence, d):

    - `"low_rank"`: `h + scaling * act(h @ W_down.T) @ W_up.T`, `W_down` (r, d), `W_up` (d, r);
    - `"vector"`: `h + scaling * v`, `v` (d,).

    Args:
        r (`int`, defaults to `8`):
            Rank of the low-rank update. Not used with `steering_type="vector"`.
        rank_pattern (`dict[str, int]`, *optional*):
            Ranks of blocks that have another rank than `r`, by the names of blocks, the ends of such names
            (`"layers.3"`) or regular expressions, as in [`~peft.LoraConfig`]. Only for `"low_rank"`.
        steering_type (`str`, defaults to `"low_rank"`):
            `"low_rank"` or `"vector"`.
        activation (`str`, *optional*):
            Name of a transformers activation (`"silu"`, `"gelu"`, ...) on the r-dimensional bottleneck. `None` is the
            identity. Only for `"low_rank"`.
        dropout (`float`, defaults to `0.0`):
            Dropout probability on the r-dimensional bottleneck, after the activation. Only for `"low_rank"`.
        init_scale (`float`, defaults to `1.0`):
            Factor on the initial `W_down`, which is otherwise initialized like LoRA's `A`. The paper's recipes use
            1e-3. Only for `"low_rank"`.
        kwargs: The fields of [`SteeringConfig`]: `scaling`, `init_weights`, `target_modules`, ...

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    r: int = field(default=8, metadata={"help": "Rank of the low-rank update. Not used with steering_type='vector'."})
    rank_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": "Ranks of blocks that have another rank than r, by their names."}
    )
    steering_type: SteeringType = field(
        default="low_rank",
        metadata={"help": "'low_rank': h + s * act(h @ W_down.T) @ W_up.T; 'vector': h + s * v."},
    )
    activation: str | None = field(
        default=None,
        metadata={"help": "Name of a transformers activation on the bottleneck. None is the identity."},
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the bottleneck."})
    init_scale: float = field(default=1.0, metadata={"help": "Factor on the initial W_down."})

    def __post_init__(self):
        super().__post_init__()
        check_choice("steering_type", self.steering_type, get_args(SteeringType))
        check_rank(self.r)
        self._check_rank_pattern()
        check_activation(self.activation)
        check_dropout(self.dropout)
        check_number("init_scale", self.init_scale)
        if self.init_scale <= 0:
            raise ValueError(f"init_scale must be greater than 0, got {self.init_scale}.")
        if self.steering_type == "vector":
            for name, default in (("activation", None), ("dropout", 0.0), ("rank_pattern", None)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be used with steering_type='vector', which has no "
                        f"bottleneck. Use {name}={default!r} or steering_type='low_rank'."
                    )

    def for_block(self, name: str, site: Site) -> AdditiveSteeringConfig:
        if not self.rank_pattern:
            return self
        config = copy.copy(self)
        config.r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        return config

    @property
    def largest_rank(self) -> int:
        """The largest rank that a block can have."""
        return max([self.r, *(self.rank_pattern or {}).values()])

    def _check_rank_pattern(self) -> None:
        pattern = self.rank_pattern
        if pattern is None:
            return
        if not isinstance(pattern, dict) or not all(isinstance(name, str) for name in pattern):
            raise TypeError(f"rank_pattern must be a dictionary from names of blocks to ranks, got {pattern!r}.")
        for rank in pattern.values():
            check_rank(rank, "rank_pattern")

    def card_fields(self):
        rank = str(self.r)
        if self.rank_pattern:
            rank = f"{min(self.rank_pattern.values())} to {max(self.rank_pattern.values())}, by block"
        update = {
            "update": self.steering_type.replace("_", " "),
            "rank": rank if self.steering_type == "low_rank" else None,
        }
        return {**update, "activation": self.activation, **super().card_fields()}


@dataclass
class PostBlockSteeringConfig(AdditiveSteeringConfig):
    """
    Configuration of a [`PostBlockSteeringModel`]: a learned update to the output of every transformer block, after its
    last residual addition. See [`AdditiveSteeringConfig`] for the update and [`SteeringConfig`] for the choice of
    blocks.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.1; `steering_type="vector"` is
    "1-vec" in Table 2.

    Args:
        kwargs: The fields of [`AdditiveSteeringConfig`] and [`SteeringConfig`].

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    site: ClassVar[str] = "post_block"

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["POST_BLOCK_STEERING"]  # added by trl_steer.registration
