"""Folders of studies as `trl-steer reproduce` leaves them, with answers that a test chooses. Nothing is trained."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_steer import cli
from trl_steer.eval import runs
from trl_steer.eval.reproduce import results, study
from trl_steer.files import write_json

# What becomes of a cell: `"1101"`, the answers of a finished run, of which those with a 1 are correct; the reason of a
# failure, see `diverged` and `failed`; or `None`, not run.
Outcome = Any
DIVERGED = results.Failure("Training diverged: the loss is NaN.", 1, True)


def write(
    folder: Path,
    contents: Mapping[str, Any],
    outcome: Callable[[study.Cell], Outcome],
    targets: Mapping[str, str],
    training: Callable[[study.Cell], Mapping[str, Any]] = lambda cell: {},
) -> Path:
    """Writes a study, and the result of each cell.

    Args:
        folder: The output folder of the study.
        contents: Those of the study file.
        outcome: What becomes of a cell.
        targets: The correct answers by task, a character for each example.
        training: Statistics of training of a cell.
    """
    made = study.from_dict(contents)
    study.save(made, folder)
    first = list(made.rate_cells())
    for cell in first:
        _write_cell(cell, folder, outcome(cell), targets, training)
    best = results.best_rates([results.result_of(cell, folder) for cell in first])
    for cell in made.test_cells(best):
        _write_cell(cell, folder, outcome(cell), targets, training)
    return folder


def _write_cell(cell, folder, outcome, targets, training) -> None:
    if isinstance(outcome, results.Failure):
        write_json(folder / results.FAILED / f"{cell.key}.json", outcome._asdict())
    elif outcome is not None:
        run = runs.Run(folder / results.CELLS / cell.key)
        write_json(run.folder / runs.SETTINGS, cell.settings.to_dict())
        write_json(run.folder / runs.TRAINING, {"losses": [2.0, 1.0], **training(cell)})
        examples = [
            {"id": f"{cell.stage}-{number}", "text": "", "answer": "", "target": target, "correct": right == "1"}
            for number, (target, right) in enumerate(zip(targets[cell.task], outcome, strict=True))
        ]
        accuracy = outcome.count("1") / len(outcome)
        task = cell.settings.task
        write_json(run.scores_file(task), {"task": task, "accuracy": accuracy, "examples": examples})


# A study with everything that can happen to a cell. Test results: model, row, task, and the answers for each seed.
SMALL = {
    "name": "small",
    "title": "Methods on two small models",
    "models": [{"name": "someone/Small", "label": "Small"}, {"name": "someone/Big"}],
    "tasks": ["boolq", {"name": "aqua", "seeds": [0, 1]}],
    "rows": [
        {"name": "SFT", "method": "full", "rates": [1e-5]},
        {"name": "LoRA r=8", "method": "lora", "rates": [3e-4]},
        {"name": "LoRA r=8, all", "method": "lora", "rates": [1e-4, 1e-3, 1e-2], "lora": {"lora_alpha": 16}},
        {"name": "r=1", "method": "low_rank", "r": 1, "rates": [2e-3]},
        {"name": "r=8", "method": "low_rank", "r": 8, "rates": [1e-3, 2e-3, 5e-3]},
        {"name": "r=8 silu", "method": "low_rank", "r": 8, "rates": [2e-3], "steering": {"activation": "silu"}},
        {"name": "vector", "method": "vector", "rates": [1e-2, 3e-2]},
    ],
    "seeds": [0, 1, 2],
    "guessed": ["the grids"],
}
TARGETS = {"boolq": "TTTTTTFFFF", "aqua": "AABBCCDDEE"}
TEST = """
Small | SFT           | boolq | 1111111100 1111111000 1111111110
Small | SFT           | aqua  | 1110001100 0111001100
Small | LoRA r=8      | boolq | 1111110100 1011111100 1111011110
Small | LoRA r=8      | aqua  | 1010001100 0110001000
Small | LoRA r=8, all | boolq | 1111111111 1111111100 0111111110
Small | LoRA r=8, all | aqua  | 1111001100 0111011100
Small | r=1           | boolq | 1111110000 1111111000 0111110000
Small | r=1           | aqua  | 1100001100 failed
Small | r=8           | boolq | 1111111000 diverged   1110111110
Small | r=8           | aqua  | 1110011100 0111001110
Small | r=8 silu      | boolq | 1111111100 1111110110 1110111110
Small | r=8 silu      | aqua  | 0111001100 1111001100
Small | vector        | boolq | 1111111100 1111110100 -
Small | vector        | aqua  | 1110001100 0111001100
Big   | SFT           | boolq | 1111111111 1111111111 1111111111
Big   | SFT           | aqua  | diverged   0111111100
Big   | LoRA r=8      | boolq | 0000000000 0000000000 0000000000
Big   | LoRA r=8      | aqua  | 1110111100 0110111100
Big   | LoRA r=8, all | boolq | 1111111111 1111011111 1111111110
Big   | LoRA r=8, all | aqua  | 1111101110 0111011110
Big   | r=1           | boolq | 1111111110 1111111100 0111111110
Big   | r=1           | aqua  | diverged   0110001100
Big   | r=8           | boolq | 1111111110 1111111101 1111111011
Big   | r=8           | aqua  | 1110011110 0111101110
Big   | r=8 silu      | boolq | 1111101110 1111011110 0111111110
Big   | r=8 silu      | aqua  | 1111011100 0111001101
Big   | vector        | boolq | 1111101111 1110111110 1111011111
"""
# Model, row and task, and the answers on validation at each rate.
VALIDATION = """
Small | LoRA r=8, all | boolq | 1110000000 1111111100 1110000000
Small | LoRA r=8, all | aqua  | 1100000000 1111000000 1000000000
Small | r=8           | boolq | 1111000000 1111110000 diverged
Small | r=8           | aqua  | 1111000000 1110000000 diverged
Small | vector        | boolq | 1111100000 1110000000
Small | vector        | aqua  | 1111110000 1111110000
Big   | LoRA r=8, all | boolq | 1110000000 1111000000 1111111000
Big   | LoRA r=8, all | aqua  | 1100000000 1111000000 failed
Big   | r=8           | boolq | 1111111000 1111110000 diverged
Big   | r=8           | aqua  | 1111000000 1111100000 diverged
Big   | vector        | boolq | 1111000000 1111110000
Big   | vector        | aqua  | 1111000000 -
"""
FAILED = results.Failure("The GPU | is out of *memory*.", 3, False)
PARAMETERS = {"full": 1_000_000, "lora": 20_000, "low_rank": 1000, "vector": 500}


def small(folder: Path) -> Path:
    """Writes the study of [`SMALL`]."""
    return write(folder, SMALL, small_outcome, TARGETS, small_training)


def small_outcome(cell: study.Cell) -> Outcome:
    if cell.stage == "rates":
        rates = next(row["rates"] for row in SMALL["rows"] if row["name"] == cell.row)
        place, text = rates.index(cell.rate), VALIDATION
    else:
        place, text = cell.seed, TEST
    word = parse(text)[cell.model, cell.row, cell.task][place]
    return {"diverged": DIVERGED, "failed": FAILED, "-": None}.get(word, word)


def small_training(cell: study.Cell) -> dict[str, Any]:
    parameters = PARAMETERS[cell.settings.method] * (cell.settings.r if cell.settings.method == "low_rank" else 1)
    share = parameters / PARAMETERS["full"]
    machine = {"seconds": 12.5, "tokens_per_second": 80.0, "peak_memory_bytes": 2_000_000}
    return {"trainable_parameters": parameters, "trainable_share": share, "steps": 60, "tokens": 1000, **machine}


def parse(text: str) -> dict[tuple[str, str, str], list[str]]:
    lines = [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]
    return {(model, row, task): words.split() for model, row, task, words in lines}


def table(text, caption):
    """The rows of the table below a paragraph that begins so. Empty cells of groups are filled."""
    (found,) = re.findall(rf"^{re.escape(caption)}.*\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in found.splitlines()]
    header, rows, before = [cell.strip() for cell in found.splitlines()[0].strip("|").split("|")], [], []
    for line in found.splitlines()[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == len(header) == len(lines[0])
        # The first cells of a row are empty where they are those of the row before.
        for place in range(2):
            if not cells[place] and before:
                cells[place] = before[place]
            else:
                break
        rows.append(cells)
        before = cells
    return header, rows


def failure(capsys, *arguments):
    """What `trl-steer report` prints where it fails, line by line."""
    capsys.readouterr()
    assert cli.main(["report", *map(str, arguments)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()
