"""Rows in the columns of the six datasets, written for the tests, and a folder of them laid out like the Hub."""

import random
from pathlib import Path

import datasets

from trl_steer.tasks import listops

PEOPLE = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Lea"]


def boolq(i: int) -> dict:
    person = PEOPLE[i % len(PEOPLE)]
    return {
        "question": f"did {person.lower()} plant {i} trees",
        "answer": i % 3 == 0,
        "passage": f"{person} keeps a garden.\nIn the {i}th year it had trees \u2013 some of them plum.",
    }


def winogrande(i: int) -> dict:
    first, second = PEOPLE[i % len(PEOPLE)], PEOPLE[(i + 5) % len(PEOPLE)]
    return {
        "sentence": f"{first} lent {second} {i} books because _ had read them all.",
        "option1": first,
        "option2": second,
        "answer": str(1 + i % 2),
    }


def arc_challenge(i: int) -> dict:
    labels = ["1", "2", "3", "4"] if i % 4 == 3 else ["A", "B", "C", "D", "E"][: 3 + i % 3]
    texts = ["A spoon of iron", "water (ice)", "wood", "25 grams of salt", "none of these"][: len(labels)]
    return {
        "id": f"row-{i}",
        "question": f"Which of these melts first in oven {i}?",
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[i % len(labels)],
    }


def gsm8k(i: int) -> dict:
    total = 500 * i - 600
    return {
        "question": f"A farm sells {i} sacks for $500 each and pays $600 of rent. What does it earn?",
        "answer": f"It takes {i} * 500 = $<<{i}*500={i * 500}>>{i * 500}.\n600 go to rent. \n#### {total:,}",
    }


def aqua(i: int) -> dict:
    return {
        "question": f"A car goes {i} km in 2 hours. What is its speed?",
        "options": [f"{label}){' ' * (i % 2)}{i / 2 + step} km/h" for step, label in enumerate("ABCDE")],
        "rationale": f"Speed = distance/time, so A = {i}/2.\nAnswer: {'ABCDE'[i % 5]}" + "\n" * (i % 2),
        "correct": "ABCDE"[i % 5],
    }


def listops_rows(count: int, seed: int) -> list[dict]:
    rows = listops.generate(count, seed=seed, max_tokens=16)
    return [{"Source": expression, "Target": listops.evaluate(expression)} for expression in rows]


def rows_of(benchmark: str, count: int = 60) -> list[dict]:
    """Distinct rows in the published columns, always the same ones."""
    if benchmark == "listops":
        return listops_rows(count, seed=5)
    make = {function.__name__: function for function in (boolq, winogrande, arc_challenge, gsm8k, aqua)}[benchmark]
    rows = [make(i) for i in range(count)]
    random.Random(0).shuffle(rows)
    return rows


# benchmark -> where the Hub has it, the config, and the sizes of its labelled splits here.
LAYOUT = {
    "boolq": ("google/boolq", "default", {"train": 31, "validation": 9}),
    "winogrande": ("allenai/winogrande", "winogrande_debiased", {"train": 30, "validation": 10}),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", {"train": 20, "validation": 7, "test": 11}),
    "gsm8k": ("openai/gsm8k", "main", {"train": 30, "test": 10}),
    "aqua": ("deepmind/aqua_rat", "raw", {"train": 20, "validation": 8, "test": 9}),
    "listops": ("fengyang0317/listops-64", "default", {"train": 20, "validation": 8, "test": 9}),
}


def write_hub(folder: Path) -> Path:
    """Writes all six into `folder`, in the Hub's layout, so that `load_dataset` reads them from that folder."""
    for benchmark, (dataset_path, config, sizes) in LAYOUT.items():
        write_config(folder / dataset_path, config, sizes, rows_of(benchmark))
    return folder


def write_config(folder: Path, config: str, sizes: dict[str, int], rows: list[dict]) -> None:
    left = iter(rows)
    for split, size in sizes.items():
        path = folder / config / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([next(left) for _ in range(size)]).to_parquet(path)
    card = folder / "README.md"
    entries = card.read_text().split("---")[1].removeprefix("\nconfigs:\n") if card.exists() else ""
    files = "".join(f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in sizes)
    card.write_text(f"---\nconfigs:\n{entries}- config_name: {config}\n  data_files:\n{files}---\n")
