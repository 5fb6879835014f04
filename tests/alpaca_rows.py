"""A reference set and model outputs of our own making, in the form of the real ones."""

import csv
import json
import random
from pathlib import Path

from trl_steer.eval.alpaca_eval import reference

WORDS = ["amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "lagoon"]


def sentence(draw, words):
    return " ".join(draw.choice(WORDS) for _ in range(words)).capitalize() + "."


def write_reference(folder: Path, count: int) -> Path:
    """Both reference files with `count` rows; row `i` has a difficulty that no other has."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    rows = [
        {
            "dataset": draw.choice(["helpful", "koala"]),
            "instruction": f"Write {draw.randint(2, 9)} words about {draw.choice(WORDS)}, number {index}.",
            "output": sentence(draw, draw.randint(5, 40)),
            "generator": "written_baseline",
        }
        for index in range(count)
    ]
    (folder / reference.BASELINE).write_text(json.dumps(rows))
    difficulties = [draw.gauss(0, 1.5) for _ in range(count)]
    with (folder / reference.GAMED).open("w", newline="") as file:
        writer = csv.DictWriter(file, reference.GAMED_COLUMNS)
        writer.writeheader()
        for name, length in (("written_concise", -1), ("written_verbose", 1)):
            for index, difficulty in enumerate(difficulties):
                writer.writerow(
                    {
                        "index": index,
                        "instruction_difficulty": difficulty,
                        "std_delta_len": length * draw.random(),
                        "preference": min(max(0.5 - 0.15 * length * draw.random(), 0), 1),
                        "not_gamed_baseline": False,
                        "model": name,
                    }
                )
    return folder


def outputs_for(folder: Path, rows=None, name="my-model", seed=3):
    """A model's outputs for the given canonical rows, by default all, in that order.

    They are about pebbles where the instruction is hard, which the judge likes, so that difficulty matters beside
    length.
    """
    baseline = json.loads((folder / reference.BASELINE).read_text())
    with (folder / reference.GAMED).open() as file:
        difficulties = [float(row["instruction_difficulty"]) for row in csv.DictReader(file)]
    outputs = []
    for index in range(len(baseline)) if rows is None else rows:
        draw = random.Random(f"{seed} {index}")
        pebbles = " Pebble." * max(0, round(3 + 3 * difficulties[index]))
        outputs.append(
            {
                "dataset": baseline[index]["dataset"],
                "instruction": baseline[index]["instruction"],
                "output": sentence(draw, draw.randint(8, 30)) + pebbles,
                "generator": name,
            }
        )
    return outputs


def write_outputs(path: Path, outputs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(outputs))
    return path
