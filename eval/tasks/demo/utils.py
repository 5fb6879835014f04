"""What the lm-eval task beside this file takes from `trl_steer.tasks.listops`, for one generated held-out set."""

import json
from pathlib import Path

import datasets

from trl_steer.tasks import listops

HELD_OUT = Path(__file__).with_name("held_out.jsonl")


def held_out(**_kwargs) -> datasets.DatasetDict:
    if not HELD_OUT.is_file():
        raise FileNotFoundError(
            f"{HELD_OUT} is missing. This task scores what `trl-steer demo` generated: run the demo first, then pass "
            "the task folder in its output as --include_path."
        )
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))


def doc_to_text(doc: dict) -> str:
    return doc["prompt"]


def doc_to_target(doc: dict) -> str:
    return listops.strict(doc["completion"]) or ""


def extract_answers(responses: list[list[str]], _docs: list[dict]) -> list[str]:
    """The first response's answer for each document; empty, which is never right, where it gives none."""
    return [listops.strict(texts[0]) or "" for texts in responses]
