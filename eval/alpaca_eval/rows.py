"""A model's outputs, and their place in the reference set."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUTS = "model_outputs.json"
COLUMNS = ("instruction", "output", "generator")


class OutputsError(ValueError):
    """A file of model outputs is not what it should be."""


@dataclass(frozen=True)
class Outputs:
    """A model's outputs by canonical row.

    Attributes:
        generator (`str`): The model's name.
        by_row (`dict[int, str]`): The output for each canonical row that has one, in their order.
    """

    generator: str
    by_row: dict[int, str]

    def first(self, limit: int | None) -> Outputs:
        """The outputs for the first `limit` of these rows."""
        return Outputs(self.generator, dict(list(self.by_row.items())[:limit]))


def find(path: Path) -> Path:
    """The file of model outputs: `path` itself, or the one in that folder."""
    file = path / OUTPUTS if path.is_dir() else path
    if not file.is_file():
        raise OutputsError(f"{file} does not exist; expected a {OUTPUTS}, or a folder that `generate` has finished.")
    return file


def read(path: Path, reference: Sequence[dict[str, str]]) -> Outputs:
    """Reads model outputs in any order, and gives each its canonical row by its instruction.

    The package joins an instruction's difficulty by position in the file instead, so that a subset or a permutation
    silently gets the difficulties of other instructions.

    Raises:
        OutputsError: if there are rows with other columns, unknown or repeated instructions, or several generators.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))  # some tools begin a file with a mark
    except ValueError as error:
        raise OutputsError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise OutputsError(f"{path} should hold a list of rows with instruction, output and generator.")
    places: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(reference):
        places[row["instruction"]].append(index)
    by_row, generators = {}, set()
    for number, row in enumerate(rows):
        _check(row, f"row {number} of {path}")
        place = places[row["instruction"]]
        if not place:
            raise OutputsError(
                f"row {number} of {path}: the instruction {row['instruction'][:60]!r} is not in the reference set, "
                "or there more often than in it. Its text must be the reference's, character by character."
            )
        # Where an instruction is there twice, its data set tells which one is meant.
        index = next((index for index in place if reference[index]["dataset"] == row.get("dataset")), place[0])
        place.remove(index)
        by_row[index] = row["output"]
        generators.add(row["generator"])
    if len(generators) != 1:
        raise OutputsError(f"{path} should hold the outputs of one generator, got {', '.join(sorted(generators))}.")
    return Outputs(generators.pop(), dict(sorted(by_row.items())))


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise OutputsError(f"{where} should be an object with {', '.join(COLUMNS)}, got {type(row).__name__}.")
    lacking = [name for name in COLUMNS if not isinstance(row.get(name), str)]
    if lacking:
        raise OutputsError(f"{where} lacks {', '.join(lacking)}; expected text in {', '.join(COLUMNS)}.")
    broken = [name for name in COLUMNS if row[name] != row[name].encode("utf-8", "replace").decode()]
    if broken:
        raise OutputsError(f"{where}: its {', '.join(broken)} holds half of a surrogate pair, which is no character.")
