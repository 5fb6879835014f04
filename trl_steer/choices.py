"""Values that configurations and command lines have in common, without importing PyTorch."""

from __future__ import annotations

import re
from typing import Any, Literal

SteeringType = Literal["low_rank", "vector"]
SublayerSite = Literal["pre_mlp", "post_mlp", "post_attn"]
LoReftSite = Literal["post_block", "post_mlp"]
# Sites where the oracle's regressions read the state, and how vectors are made from contrast pairs.
OracleSite = Literal["post_block", "post_mlp", "post_attn", "pre_mlp"]
ExtractionMethod = Literal["mean", "pca", "pca_center", "logistic"]

ALL = "all"
LAST_PROMPT = "last_prompt"
_FIRST_AND_LAST = re.compile(r"f([1-9]\d*)\+l\1")


def first_and_last(positions: Any) -> int:
    """The `n` of `positions="fn+ln"`, or 0 for the other values.

    Raises:
        ValueError: `positions` has an invalid value.
    """
    match = _FIRST_AND_LAST.fullmatch(positions) if isinstance(positions, str) else None
    if match is not None:
        return int(match[1])
    if positions not in (ALL, LAST_PROMPT):
        raise ValueError(
            f"Expected positions to be {ALL!r}, {LAST_PROMPT!r}, or for example 'f7+l7' (the first and the last 7 "
            f"tokens of the prompt, the same number of both), got {positions!r}."
        )
    return 0
