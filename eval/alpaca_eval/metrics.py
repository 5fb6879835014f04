"""The package's metrics, on rows that carry their canonical index."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import package

if TYPE_CHECKING:
    import pandas

NUMBERS = ("win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error", "discrete_win_rate")
COUNTS = ("n_wins", "n_wins_base", "n_draws", "n_total")


def compute(annotations: pandas.DataFrame, gamed: Path, weights: Path) -> dict[str, Any]:
    """Win rate and length-controlled win rate by the package.

    Args:
        annotations (`pandas.DataFrame`): The package's annotations of the rows that have a judgement, indexed by
            canonical row: the package takes the difficulty of an instruction by this index.
        gamed (`Path`): The table `df_gamed.csv`.
        weights (`Path`): Folder to write the coefficients of the length-controlling model to.

    Returns:
        `dict`: The package's numbers as plain Python values, None for what is no number, and `glm_error` where the
        length-controlling model could not be fitted.
    """
    module = package.load()
    ordered = annotations.sort_index()  # folds of the cross-validation depend on the order
    result: dict[str, Any] = {}
    try:
        with local_table(gamed):
            found = module.metrics.get_length_controlled_winrate(
                ordered, save_weights_dir=weights, is_add_glm_preference_inplace=False
            )
    except (ValueError, ArithmeticError, IndexError, KeyError) as error:
        found = module.metrics.get_winrate(ordered)
        result["glm_error"] = f"{type(error).__name__}: {error}"
    result |= {name: _plain(found.get(name)) for name in NUMBERS}
    result |= {name: int(found[name]) for name in COUNTS}
    # As the package counts it: over the model's outputs, in characters, rounded down.
    result["avg_length"] = int(ordered["output_2"].str.len().mean())
    return result


def _plain(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


@contextmanager
def local_table(gamed: Path) -> Iterator[None]:
    """The package downloads the table, at no fixed revision, each time it computes metrics; it gets ours instead."""
    glm = package.load().metrics.glm_winrate
    theirs = glm.hf_hub_download
    glm.hf_hub_download = lambda **_: str(gamed)
    try:
        yield
    finally:
        glm.hf_hub_download = theirs
