"""The texts that measures run on: of a task, or of a file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from trl_steer.tasks import load_task
from trl_steer.tasks.sources import READERS, reader_of

COLUMNS = ("text", "prompt", "messages")


def read_texts(args: Any, tokenizer: Any) -> tuple[list[str], bool]:
    """The texts of `--task` or `--text`, and whether a chat template has added the special tokens.

    Raises:
        ValueError: There are none, or they have another format.
    """
    rows = _rows_of_task(args.task, args.split) if args.task else _rows_of_file(args.text)
    if not len(rows):
        raise ValueError(f"{args.text or args.task} has no prompts. Give at least one text.")
    chosen = sorted(random.Random(args.seed).sample(range(len(rows)), min(args.rows, len(rows))))
    examples = [rows[index] for index in chosen]
    is_chat = not isinstance(_first_part(examples[0]), str)
    return [_text(example, args, tokenizer, is_chat) for example in examples], is_chat


def _rows_of_task(task: str, split: str) -> Any:
    splits = load_task(task)
    if split not in splits:
        raise ValueError(f"Task {task!r} has no split {split!r}. Choose one of: {', '.join(splits)}.")
    return splits[split]


def _rows_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".txt":
        return [{"text": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    reader = reader_of(str(path))
    if reader is None:
        raise ValueError(f"{path} should end in .txt, {', '.join(READERS)}.")
    if not path.stat().st_size:
        return []
    import datasets

    try:
        return datasets.load_dataset(reader, data_files=str(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def _first_part(example: dict) -> Any:
    for column in COLUMNS:
        if example.get(column) is not None:
            return example[column]
    raise ValueError(f"Expected rows with one of the columns {', '.join(COLUMNS)}, got {', '.join(example)}.")


def _text(example: dict, args: Any, tokenizer: Any, is_chat: bool) -> str:
    first = _first_part(example)
    rest = None if args.prompts_only else example.get("completion")
    if not is_chat:
        return first + (rest or "")
    return chat_text([*first, *(rest or [])], tokenizer)


def chat_text(messages: list[dict], tokenizer: Any) -> str:
    """Messages in the chat template, with the start of an answer if the last one is none."""
    is_answered = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not is_answered)
