"""The reference set (805 instructions and outputs), the table for length control, and the outputs of a model.

The first two are files in a dataset repository on the Hub, at a fixed revision. (`alpaca-eval` itself uses the
repository's dataset script, which `datasets` no longer supports, and downloads the table after the last paid request.)
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = "tatsu-lab/alpaca_eval"
REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
BASELINE = "alpaca_eval_gpt4_baseline.json"
GAMED = "df_gamed.csv"
COUNT = 805
OUTPUTS = "model_outputs.json"
BASELINE_COLUMNS = ("instruction", "output", "generator", "dataset")
OUTPUT_COLUMNS = BASELINE_COLUMNS[:3]
GAMED_COLUMNS = ("index", "instruction_difficulty", "std_delta_len", "preference", "not_gamed_baseline", "model")


@dataclass(frozen=True)
class Reference:
    """The reference set: `rows`, whose indices identify them, and `gamed`, the table for length control.

    `verified` is whether the files were downloaded at the fixed revision.
    """

    rows: list[dict[str, str]]
    gamed: Path | None
    sha256: dict[str, str]
    verified: bool

    def describe(self) -> dict[str, Any]:
        return {"revision": REVISION if self.verified else None, "rows": len(self.rows), "sha256": self.sha256}


def load(folder: Path | None = None, with_gamed: bool = True) -> Reference:
    """Loads the reference set from the Hub or a folder.

    Raises:
        ValueError: Files, rows or columns are missing.
    """
    paths = {name: _find(name, folder) for name in (BASELINE, GAMED)[: 2 if with_gamed else 1]}
    try:
        rows = json.loads(paths[BASELINE].read_text(encoding="utf-8"))
        is_valid = all(isinstance(row[name], str) for row in rows for name in BASELINE_COLUMNS)
    except (LookupError, TypeError, ValueError):
        is_valid, rows = False, []
    if not rows or not is_valid or (folder is None and len(rows) != COUNT):
        raise ValueError(f"{paths[BASELINE]} must have {COUNT} rows with {', '.join(BASELINE_COLUMNS)}.")
    if with_gamed:
        _check_gamed(paths[GAMED], len(rows))
    sha256 = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return Reference(rows, paths.get(GAMED), sha256, verified=folder is None)


def _find(name: str, folder: Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        if folder is None:
            return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=REVISION))
        return (folder / name).resolve(strict=True)
    except (OSError, ValueError) as error:  # includes all errors of huggingface_hub
        raise ValueError(
            f"Can't find {name} in {folder or REPOSITORY} ({type(error).__name__}). Pass a folder with copies of "
            f"{BASELINE} and {GAMED} of the Hub dataset {REPOSITORY}, revision {REVISION}, as --reference."
        ) from error


def _check_gamed(path: Path, count: int) -> None:
    import pandas

    table = pandas.read_csv(path)
    index = table["index"].tolist() if set(GAMED_COLUMNS) <= set(table) else []
    # The package looks up a row's difficulty by its position in this table.
    if index[:count] != list(range(count)) or set(index) != set(range(count)):
        raise ValueError(
            f"{path} must have the columns {', '.join(GAMED_COLUMNS)} and the rows of {BASELINE} in the same order."
        )


@dataclass(frozen=True)
class Outputs:
    """The model's name, and its outputs by reference row, in order."""

    generator: str
    by_row: dict[int, str]


def find_outputs(path: Path) -> Path:
    """The file of outputs: `path`, or the one in this folder."""
    file = path / OUTPUTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist. Pass a {OUTPUTS}, or the folder of a finished `generate`.")
    return file


def read_outputs(path: Path, reference: Reference) -> Outputs:
    """Reads model outputs in any order, and finds their reference rows by their instructions.

    (The package uses the position in the file, which gives wrong difficulties for a subset.)

    Raises:
        ValueError: Columns are missing, instructions are unknown or repeated, or there are several generators.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must be a list of rows with {', '.join(OUTPUT_COLUMNS)}.")
    places: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(reference.rows):
        places[row["instruction"]].append(index)
    by_row, generators = {}, set()
    for number, row in enumerate(rows):
        where = f"Row {number} of {path}"
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in OUTPUT_COLUMNS):
            raise ValueError(f"{where} must be an object with strings in {', '.join(OUTPUT_COLUMNS)}.")
        if any("\ud800" <= letter <= "\udfff" for letter in row["output"]):
            raise ValueError(f"{where} has an unpaired surrogate, which cannot be sent. Remove it from the output.")
        place = places[row["instruction"]]
        if not place:
            raise ValueError(
                f"{where}: instruction {row['instruction'][:60]!r} is not in the reference set, or is repeated."
            )
        # An instruction that is in the reference set twice is identified by its dataset.
        index = next((index for index in place if reference.rows[index]["dataset"] == row.get("dataset")), place[0])
        place.remove(index)
        by_row[index] = row["output"]
        generators.add(row["generator"])
    if len(generators) != 1:
        raise ValueError(f"{path} must have outputs of one generator, got {', '.join(sorted(generators))}.")
    return Outputs(generators.pop(), dict(sorted(by_row.items())))
