"""Which rows train, choose hyperparameters, and test: the drawing of held-out rows, independent of library versions.

`datasets` draws `train_test_split` and `shuffle` from NumPy's default generator. The same is done here by hand, so
that a split is what `datasets` 5 gives today and stays that when `datasets` changes. The seed and the share are the
paper's (appendix F.1): 42 and 20%.
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
    """The row numbers of `Dataset.train_test_split(test_size=share, seed=seed)`: those that stay, those drawn.

    Args:
        count (`int`): How many rows there are.
        share (`float`): Which part of them is drawn, rounded up to a whole number of rows.
        seed (`int`): Seed of the drawing.
    """
    order = permutation(count, seed)
    drawn = math.ceil(share * count)
    return order[drawn:], order[:drawn]


def permutation(count: int, seed: int = SEED) -> list[int]:
    """The row numbers in the order of `Dataset.shuffle(seed=seed)`."""
    import numpy

    return numpy.random.default_rng(seed).permutation(count).tolist()


def official(rows: Rows) -> dict[str, "Dataset"]:
    """The published splits as they are; one that a copy lacks is left out."""
    return {name: rows[name] for name in NAMES if name in rows}


def validation_from_train(test: str) -> Splitter:
    """For data sets with two labelled splits: `test` is one of them, 20% of the training rows choose."""

    def split(rows: Rows) -> dict[str, "Dataset"]:
        parts = {"test": rows[test]} if test in rows else {}
        if "train" in rows:
            stay, drawn = draw(len(rows["train"]), HELD_OUT)
            parts = {"train": rows["train"].select(stay), "validation": rows["train"].select(drawn), **parts}
        return parts

    return split


def halves_of(source: str, share: float, *, first: str, second: str) -> Splitter:
    """The authors' way: shuffle one published split, then divide it; the training rows stay whole.

    Args:
        source (`str`): The split that is divided.
        share (`float`): Which part of it is drawn.
        first, second (`str`): What the undrawn and the drawn part are used as.
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
    """Takes from validation what is also in test, and from train what is also in either; equal in the columns `key`.

    Published training sets hold a few rows twice, and a drawing may put one of them on each side.
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
