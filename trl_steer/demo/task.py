"""The demo's task folder: generated ListOps examples, and the lm-eval task that scores the held-out ones."""

import importlib.resources
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trl_steer.demo.settings import Settings
from trl_steer.files import new_folder, read_jsonl, write_jsonl
from trl_steer.tasks import listops

NAME = "steer_demo_listops"
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


def write_task(settings: Settings, folder: Path) -> None:
    """Makes `folder`: `train.jsonl` and `held_out.jsonl` in TRL's prompt-completion form beside the lm-eval task."""
    splits = listops.generate_splits(
        {HELD_OUT: settings.held_out_examples, TRAIN: settings.train_examples},
        seed=settings.seed,
        max_tokens=settings.max_tokens,
    )
    with new_folder(folder) as partial:
        for name, expressions in splits.items():
            write_jsonl(partial / name, map(listops.example, expressions))
        for source in importlib.resources.files("trl_steer.eval").joinpath("tasks", "demo").iterdir():
            if source.is_file() and not source.name.endswith(".md"):
                (partial / source.name).write_bytes(source.read_bytes())


def shortcuts(folder: Path) -> dict[str, list[bool]]:
    """What needs no model: for each shortcut, whether it answers each held-out example correctly."""
    majority = Counter(_answer(row) for row in read_jsonl(folder / TRAIN)).most_common(1)[0][0]
    rows = read_jsonl(folder / HELD_OUT)
    expressions = [_expression(row) for row in rows]
    guesses: dict[str, Sequence[int]] = {
        "majority answer": [majority] * len(rows),
        "largest digit": [listops.largest_digit(expression) for expression in expressions],
        "root operator over all digits": [listops.root_operator_over_all_digits(text) for text in expressions],
    }
    answers = [_answer(row) for row in rows]
    return {name: [a == b for a, b in zip(guess, answers, strict=True)] for name, guess in guesses.items()}


def _answer(row: dict) -> int:
    answer = listops.strict(row["completion"])
    assert answer is not None, row
    return int(answer)


def _expression(row: dict) -> str:
    return row["prompt"].rstrip("\n").rsplit("\n", 1)[-1]
