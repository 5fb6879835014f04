"""The train, validation and test splits.

They are the same as those of `train_test_split` and `shuffle` in `datasets` 5, but do not depend on the version of
`datasets`. The seed, 42, and the proportion of held-out rows, 20%, are the paper's (appendix F.1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 42
HELD_OUT = 0.2
NAMES = ("train", "validation", "test")

Rows = Mapping[str, "Dataset"]
Splitter = Callable[[Rows], dict[str, "Dataset"]]


def draw(count: int, share: float, seed: int = SEED) -> tuple[list[int], list[int]]:
    """The row indices of `Dataset.train_test_split(test_size=share, seed=seed)`: those of train and of test.

    Args:
        count (`int`): Number of rows.
        share (`float`): Proportion of the rows in test, rounded up.
        seed (`int`): Random seed.
    """
    order = permutation(count, seed)
    drawn = math.ceil(share * count)
    return order[drawn:], order[:drawn]


def permutation(count: int, seed: int = SEED) -> list[int]:
    """The row indices in the order of `Dataset.shuffle(seed=seed)`."""
    import numpy

    return numpy.random.default_rng(seed).permutation(count).tolist()


def official(rows: Rows) -> dict[str, "Dataset"]:
    """The published splits, without those that are missing."""
    return {name: rows[name] for name in NAMES if name in rows}


def validation_from_train(test: str) -> Splitter:
    """Splits of a dataset with two labelled splits: `test` is one of them, validation is 20% of the training rows."""

    def split(rows: Rows) -> dict[str, "Dataset"]:
        parts = {"test": rows[test]} if test in rows else {}
        if "train" in rows:
            stay, drawn = draw(len(rows["train"]), HELD_OUT)
            parts = {"train": rows["train"].select(stay), "validation": rows["train"].select(drawn), **parts}
        return parts

    return split


def split_in_two(source: str, share: float, *, first: str, second: str) -> Splitter:
    """Splits as in the authors' code: one published split is shuffled and split in two. Train is the published one.

    Args:
        source (`str`): The published split.
        share (`float`): Proportion of its rows in `second`.
        first, second (`str`): Names of the two parts.
    """

    def split(rows: Rows) -> dict[str, "Dataset"]:
        parts = {"train": rows["train"]} if "train" in rows else {}
        if source in rows:
            shuffled = permutation(len(rows[source]))
            for name, part in zip((first, second), draw(len(shuffled), share), strict=True):
                parts[name] = rows[source].select([shuffled[index] for index in part])
        return {name: parts[name] for name in NAMES if name in parts}

    return split


def disjoint(parts: Mapping[str, "Dataset"], key: Sequence[str]) -> dict[str, "Dataset"]:
    """Removes rows of validation that are also in test, and rows of train that are also in one of them. Rows are the
    same if the columns `key` are equal.

    Published training sets have a few duplicate rows, which a random split can separate.
    """
    seen: set[str] = set()
    kept: dict[str, Dataset] = {}
    for name in reversed(NAMES):
        if name not in parts:
            continue
        keys = [str(values) for values in zip(*(parts[name][column] for column in key), strict=True)]
        new = [index for index, value in enumerate(keys) if value not in seen]
        kept[name] = parts[name] if len(new) == len(keys) else parts[name].select(new)
        seen.update(keys)
    return {name: kept[name] for name in NAMES if name in kept}
