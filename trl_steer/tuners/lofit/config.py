"""Configuration of LoFiT, and the part of it that all tuners of attention heads share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from peft.utils import PeftType

from ..steering.config import SteeringConfig, check_choice, check_number, is_integer
from ..steering.matching import block_index
from ..steering.sites import Site

Phase = Literal["offset", "scale"]
PENALTY_WEIGHT = 5e-4


class HeadLayout(NamedTuple):
    """
    The attention heads of one block.

    Attributes:
        num_heads (`int`): Number `H` of query heads.
        head_dim (`int`): Size `k` of a head.
        heads (`tuple[int, ...]`, *optional*): The heads to steer, `None` for all.
    """

    num_heads: int
    head_dim: int
    heads: tuple[int, ...] | None = None


@dataclass
class HeadSteeringConfig(SteeringConfig):
    """
    Base class of the configurations of tuners that steer attention heads: the input (batch, sequence, H * k) of the
    attention's output projection, where head `i` fills the entries from `i * k` to `(i + 1) * k`. `H` is the number of
    query heads, also with grouped-query attention, and `H * k` may differ from the hidden size (Qwen3, Gemma).
    """

    site: ClassVar[str] = "heads"
    # Of the configuration of one block, see `for_block`. Not a field, since it is not saved.
    layout: ClassVar[HeadLayout | None] = None

    def for_block(self, name: str, site: Site) -> HeadSteeringConfig:
        if not site.head_dim or site.width % site.head_dim:
            raise ValueError(
                f"Could not find the attention heads of {name}: the input of {site.module} has {site.width} entries, "
                f"which are not heads of size {site.head_dim}. Exclude this block with `exclude_modules`."
            )
        config = copy.copy(self)
        vars(config)["layout"] = HeadLayout(site.width // site.head_dim, site.head_dim)
        return config


@dataclass
class LofitConfig(HeadSteeringConfig):
    """
    Configuration of a [`LofitModel`]: `x' = x + scaling * v` for each attention head, with `v` (k,) and `x` (batch,
    sequence, k) the head's output before the attention's output projection.

    The method has a first phase, to choose the heads:

    1. `LofitConfig(phase="scale")` trains factors instead, `x' = x + scaling * a * x` with `a` (k,), under the penalty
       `penalty_weight * sum |a|`. The penalty needs [`PenaltyCallback`] among the callbacks of the trainer.
    2. [`top_heads`] ranks the heads by `||a||_2`.
    3. `LofitConfig(heads=...)` trains the offsets of the heads on top, from the base model again and without penalty.

    Without `heads`, the offsets of all heads are trained, which needs no first phase.

    Reference: "LoFiT: Localized Fine-tuning on LLM Representations" (arXiv 2406.01563), section 3.

    Args:
        phase (`str`, defaults to `"offset"`):
            `"offset"` trains `v`, `"scale"` trains `a`.
        heads (`dict[int, list[int]]` or `list[tuple[int, int]]`, *optional*):
            The heads to steer: indices of heads by the index of their block, or pairs of both, as [`top_heads`]
            returns them. Only these have parameters, and only their blocks are steered (of which
            `layers_to_transform` can select some). Default: all heads.
        penalty_weight (`float`, defaults to `5e-4`):
            Weight `lambda` of the L1 penalty. Only for `phase="scale"`.
        kwargs: The fields of [`SteeringConfig`]. `a` and `v` are drawn from N(0, 1e-3), with `init_weights=False` from
            N(0, 0.2).

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    phase: Phase = field(
        default="offset", metadata={"help": "'offset': x + s * v; 'scale': x + s * a * x, to choose heads."}
    )
    heads: dict[int, list[int]] | list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "Heads to steer by the index of their block. Default: all heads."}
    )
    penalty_weight: float = field(
        default=PENALTY_WEIGHT, metadata={"help": "Weight of the L1 penalty, only for phase='scale'."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["LOFIT"]  # added to PEFT's enum by trl_steer.registration
        check_choice("phase", self.phase, get_args(Phase))
        check_number("penalty_weight", self.penalty_weight)
        if self.penalty_weight < 0:
            raise ValueError(f"penalty_weight must be at least 0, got {self.penalty_weight}.")
        if self.phase == "offset" and self.penalty_weight != PENALTY_WEIGHT:
            raise ValueError(
                f"penalty_weight={self.penalty_weight} has no meaning for phase='offset', which has no penalty. Leave "
                f"it at {PENALTY_WEIGHT} or use phase='scale'."
            )
        if self.heads is not None:
            self._select_blocks(_heads_by_block(self.heads))

    def for_block(self, name: str, site: Site) -> LofitConfig:
        config: Any = super().for_block(name, site)
        if self.heads is None:
            return config
        heads = config.heads.get(block_index(name), [])  # a dictionary, see `_select_blocks`
        num_heads = config.layout.num_heads
        if not heads or max(heads) >= num_heads:
            raise ValueError(f"heads={self.heads} names {heads} in {name}, which has heads 0 to {num_heads - 1}.")
        vars(config)["layout"] = config.layout._replace(heads=tuple(heads))
        return config

    def card_fields(self):
        heads: Any = self.heads
        fields = {"update": self.phase, "heads": None if heads is None else sum(map(len, heads.values()))}
        return {**fields, **super().card_fields()}

    def _select_blocks(self, heads: dict[int, list[int]]) -> None:
        """Only blocks with heads are steered, and only those of them in `layers_to_transform`."""
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"heads={heads} cannot be combined with a regular expression, target_modules={self.target_modules!r}, "
                "since it says itself which blocks are steered."
            )
        layers = self.layers_to_transform
        blocks = list(heads) if layers is None else sorted([layers] if isinstance(layers, int) else layers)
        missing = [block for block in blocks if block not in heads]
        if missing:
            raise ValueError(f"layers_to_transform={layers} has blocks {missing}, of which heads={heads} has no head.")
        self.layers_to_transform = blocks
        self.heads = {block: heads[block] for block in blocks}


def _heads_by_block(heads: Any) -> dict[int, list[int]]:
    """Sorted heads by block. JSON has made strings of the blocks."""
    found: dict[int, list[int]] = {}
    for block, head in _pairs(heads):
        block = int(block) if isinstance(block, str) and block.isdecimal() else block
        for index in (block, head):
            if not is_integer(index):
                raise TypeError(f"heads must hold indices of blocks and of heads, got {index!r} in {heads!r}.")
            if index < 0:
                raise ValueError(f"heads counts blocks and heads from 0, got {index} in {heads!r}.")
        if head in found.setdefault(block, []):
            raise ValueError(f"heads names head {head} of block {block} twice: {heads!r}.")
        found[block].append(head)
    if not found:
        raise ValueError("heads is empty, so no head would be steered. Use None for all heads.")
    return {block: sorted(found[block]) for block in sorted(found)}


def _pairs(heads: Any) -> list[tuple[Any, Any]]:
    if isinstance(heads, Mapping) and all(isinstance(listed, (list, tuple)) and listed for listed in heads.values()):
        return [(block, head) for block, listed in heads.items() for head in listed]
    if isinstance(heads, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in heads):
        return [tuple(pair) for pair in heads]
    raise TypeError(
        "heads must be a dictionary of the indices of heads by the index of their block, such as {0: [3, 5]}, or a "
        f"list of pairs of both, such as [(0, 3), (0, 5)]; got {heads!r}."
    )
