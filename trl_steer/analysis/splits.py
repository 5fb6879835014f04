"""Batches to fit on, to choose by, and to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

Batches = Sequence[Mapping[str, torch.Tensor]]
Row = TypeVar("Row")


class Split(NamedTuple):
    """
    Three parts of a text, without a common row.

    Attributes:
        fit: To fit maps on.
        validation: To choose penalties and ranks by.
        held_out: To measure errors on.
    """

    fit: Batches
    validation: Batches
    held_out: Batches


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Eight of ten rows to fit on, one for validation and one held out, spread evenly over the rows.

    Raises:
        ValueError: There are fewer than ten rows.
    """
    if len(rows) < 10:
        raise ValueError(f"Got {len(rows)} texts, expected at least 10, of which two are kept for measuring errors.")
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for index, row in enumerate(rows):
        parts[max(0, index % 10 - 7)].append(row)
    return parts
