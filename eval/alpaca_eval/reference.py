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


class ReferenceSetError(ValueError):
    """The reference files cannot be had, or are not what they should be."""


@dataclass(frozen=True)
class Reference:
    """The reference set.

    Attributes:
        rows (`list[dict]`): In canonical order; a row's place in this list is its canonical index.
        gamed (`Path`, *optional*), sha256 (`dict[str, str]`): The table for length control, and the files' checksums.
        verified (`bool`): Whether the files are those of the Hub at the pinned revision, and not copies.
    """

    rows: list[dict[str, str]]
    gamed: Path | None
    sha256: dict[str, str]
    verified: bool

    def describe(self) -> dict[str, Any]:
        described = {"repository": REPOSITORY, "revision": REVISION if self.verified else None}
        return {**described, "rows": len(self.rows), "sha256": self.sha256, "verified": self.verified}


def load(folder: Path | None = None, with_gamed: bool = True) -> Reference:
    """Reads the reference set, from the Hub or from copies of its files.

    Args:
        folder (`Path`, *optional*): Holds copies of the files under their own names. Without it they are taken from
            the Hub at the pinned revision, or from the Hub's cache.
        with_gamed (`bool`, *optional*, defaults to `True`): Whether to get the table for length control too.

    Raises:
        ReferenceSetError: if a file is missing, or lacks rows or columns.
    """
    paths = {name: _find(name, folder) for name in (BASELINE, GAMED)[: 2 if with_gamed else 1]}
    try:
        rows = json.loads(paths[BASELINE].read_text(encoding="utf-8"))
        whole = all(isinstance(row[name], str) for row in rows for name in BASELINE_COLUMNS)
    except (LookupError, TypeError, ValueError):
        whole, rows = False, []
    if not rows or not whole or (folder is None and len(rows) != COUNT):
        raise ReferenceSetError(f"{paths[BASELINE]} should hold {COUNT} rows of {', '.join(BASELINE_COLUMNS)}.")
    if with_gamed:
        _check_gamed(paths[GAMED], len(rows))
    sha256 = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return Reference(rows, paths.get(GAMED), sha256, verified=folder is None)


def _find(name: str, folder: Path | None) -> Path:
    if folder is not None:
        if not (folder / name).is_file():
            raise ReferenceSetError(
                f"{folder} has no {name}; --reference wants copies of {BASELINE} and {GAMED} of the Hub dataset "
                f"{REPOSITORY} at revision {REVISION}."
            )
        return folder / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=REVISION))
    except (OSError, ValueError) as error:  # of the Hub's client, all of them
        raise ReferenceSetError(
            f"{name} of {REPOSITORY} cannot be fetched ({type(error).__name__}). Without network access, name a "
            f"folder with copies of {BASELINE} and {GAMED} by --reference."
        ) from error


def _check_gamed(path: Path, count: int) -> None:
    import pandas

    table = pandas.read_csv(path)
    index = table["index"].tolist() if set(GAMED_COLUMNS) <= set(table) else []
    # The package takes a row's difficulty by its position in this table, so the two must not differ.
    if index[:count] != list(range(count)) or set(index) != set(range(count)):
        raise ReferenceSetError(
            f"{path} should have the columns {', '.join(GAMED_COLUMNS)}, and begin with a row for each of the {count} "
            f"of {BASELINE}, in their order."
        )


class OutputsError(ValueError):
    """A file of model outputs is not what it should be."""


@dataclass(frozen=True)
class Outputs:
    """A model's outputs.

    Attributes:
        generator (`str`): The model's name.
        by_row (`dict[int, str]`): The output for each canonical row that has one, in their order.
    """

    generator: str
    by_row: dict[int, str]


def find_outputs(path: Path) -> Path:
    """The file of model outputs: `path` itself, or the one in that folder. Raises `OutputsError` if there is none."""
    file = path / OUTPUTS if path.is_dir() else path
    if not file.is_file():
        raise OutputsError(f"{file} does not exist; expected a {OUTPUTS}, or a folder that `generate` has finished.")
    return file


def read_outputs(path: Path, reference: Reference) -> Outputs:
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
        raise OutputsError(f"{path} should hold a list of rows with {', '.join(OUTPUT_COLUMNS)}.")
    places: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(reference.rows):
        places[row["instruction"]].append(index)
    by_row, generators = {}, set()
    for number, row in enumerate(rows):
        where = f"Row {number} of {path}"
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in OUTPUT_COLUMNS):
            raise OutputsError(f"{where} should be an object with text in {', '.join(OUTPUT_COLUMNS)}.")
        if any("\ud800" <= letter <= "\udfff" for letter in row["output"]):
            raise OutputsError(f"{where} holds half of a surrogate pair, which is no character and cannot be sent.")
        place = places[row["instruction"]]
        if not place:
            raise OutputsError(
                f"{where}: the instruction {row['instruction'][:60]!r} is not in the reference set, or there more "
                "often than in it. Its text must be the reference's, character by character."
            )
        # Where an instruction is there twice, its data set tells which one is meant.
        index = next((index for index in place if reference.rows[index]["dataset"] == row.get("dataset")), place[0])
        place.remove(index)
        by_row[index] = row["output"]
        generators.add(row["generator"])
    if len(generators) != 1:
        raise OutputsError(f"{path} should hold the outputs of one generator, got {', '.join(sorted(generators))}.")
    return Outputs(generators.pop(), dict(sorted(by_row.items())))
