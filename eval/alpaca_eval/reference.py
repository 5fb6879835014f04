"""The 805 instructions with the outputs they are compared to, the table that length control needs, a model's outputs.

The first two are plain files of the Hub dataset repository, read at one revision. (Its dataset *script*, which
`alpaca-eval` loads by default, is no longer run by `datasets`; and it fetches the table after the last paid call.)
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
    """The reference set. A row's place in `rows` is its canonical index; `gamed` is the table for length control.

    `verified` says whether the files are those of the Hub at the pinned revision, and not copies.
    """

    rows: list[dict[str, str]]
    gamed: Path | None
    sha256: dict[str, str]
    verified: bool

    def describe(self) -> dict[str, Any]:
        return {"revision": REVISION if self.verified else None, "rows": len(self.rows), "sha256": self.sha256}


def load(folder: Path | None = None, with_gamed: bool = True) -> Reference:
    """Reads the reference set from the Hub, or from a folder with copies of its files.

    Raises `ValueError` if a file is missing, or lacks rows or columns.
    """
    paths = {name: _find(name, folder) for name in (BASELINE, GAMED)[: 2 if with_gamed else 1]}
    try:
        rows = json.loads(paths[BASELINE].read_text(encoding="utf-8"))
        whole = all(isinstance(row[name], str) for row in rows for name in BASELINE_COLUMNS)
    except (LookupError, TypeError, ValueError):
        whole, rows = False, []
    if not rows or not whole or (folder is None and len(rows) != COUNT):
        raise ValueError(f"{paths[BASELINE]} should hold {COUNT} rows of {', '.join(BASELINE_COLUMNS)}.")
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
    except (OSError, ValueError) as error:  # of the Hub's client, all of them
        raise ValueError(
            f"{folder or REPOSITORY} has no {name}, or not within reach ({type(error).__name__}). Name a folder with "
            f"copies of {BASELINE} and {GAMED} of the Hub dataset {REPOSITORY}, revision {REVISION}, by --reference."
        ) from error


def _check_gamed(path: Path, count: int) -> None:
    import pandas

    table = pandas.read_csv(path)
    index = table["index"].tolist() if set(GAMED_COLUMNS) <= set(table) else []
    # The package takes a row's difficulty by its position in this table, so the two must not differ.
    if index[:count] != list(range(count)) or set(index) != set(range(count)):
        raise ValueError(
            f"{path} should have the columns {', '.join(GAMED_COLUMNS)}, and begin with a row for each of the {count} "
            f"of {BASELINE}, in their order."
        )


@dataclass(frozen=True)
class Outputs:
    """The model's name, and its output for each canonical row that has one, in their order."""

    generator: str
    by_row: dict[int, str]


def find_outputs(path: Path) -> Path:
    """The file of model outputs: `path` itself, or the one in that folder. Raises `ValueError` if there is none."""
    file = path / OUTPUTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; expected a {OUTPUTS}, or a folder that `generate` has finished.")
    return file


def read_outputs(path: Path, reference: Reference) -> Outputs:
    """Reads model outputs in any order, and gives each its canonical row by its instruction.

    The package goes by the position in the file, and for a subset silently takes the difficulties of other rows.
    Raises `ValueError` if there are other columns, unknown or repeated instructions, or several generators.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))  # some tools begin a file with a mark
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} should hold a list of rows with {', '.join(OUTPUT_COLUMNS)}.")
    places: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(reference.rows):
        places[row["instruction"]].append(index)
    by_row, generators = {}, set()
    for number, row in enumerate(rows):
        where = f"Row {number} of {path}"
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in OUTPUT_COLUMNS):
            raise ValueError(f"{where} should be an object with text in {', '.join(OUTPUT_COLUMNS)}.")
        if any("\ud800" <= letter <= "\udfff" for letter in row["output"]):
            raise ValueError(f"{where} holds half of a surrogate pair, which is no character and cannot be sent.")
        place = places[row["instruction"]]
        if not place:
            raise ValueError(
                f"{where}: the instruction {row['instruction'][:60]!r} is not in the reference set, or there more "
                "often than in it. Its text must be the reference's, character by character."
            )
        # Where an instruction is there twice, its data set tells which one is meant.
        index = next((index for index in place if reference.rows[index]["dataset"] == row.get("dataset")), place[0])
        place.remove(index)
        by_row[index] = row["output"]
        generators.add(row["generator"])
    if len(generators) != 1:
        raise ValueError(f"{path} should hold the outputs of one generator, got {', '.join(sorted(generators))}.")
    return Outputs(generators.pop(), dict(sorted(by_row.items())))
