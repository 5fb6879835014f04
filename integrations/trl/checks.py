"""Checks of files, folders and Hub ids in the arguments, without importing PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_steer.checkpoint_names import check_folder, check_on_hub
from trl_steer.extras import require
from trl_steer.integrations.trl.source_arguments import ArgumentError
from trl_steer.tasks.sources import READERS, reader_of


def check_paths(given: Mapping[str, Any]) -> None:
    """Checks that the model and the data exist, and creates the output folder.

    Raises:
        ArgumentError: They do not, or a row has an unknown format, or the folder cannot be created.
    """
    model = given.get("model_name_or_path")
    if not isinstance(model, str):
        raise ArgumentError("--model_name_or_path is missing. Pass a Hub id or the folder of a checkpoint.")
    try:
        check_folder(model)
    except FileNotFoundError as error:
        raise ArgumentError(f"--model_name_or_path: {error}") from error
    if given.get("init_from"):
        try:
            check_folder(str(given["init_from"]), "adapter_config.json")
        except FileNotFoundError as error:
            raise ArgumentError(f"--init_from: {error}") from error
    for name in ("load_in_4bit", "load_in_8bit"):
        if str(given.get(name)).lower() in ("true", "t", "yes", "y", "1"):
            try:
                require("quant", "bitsandbytes")
            except ModuleNotFoundError as error:
                raise ArgumentError(f"--{name}: {error}") from error
    _check_data(given)
    output = Path(str(given.get("output_dir") or "trainer_output"))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"Can't create --output_dir {output}: {error.strerror}.") from error
    try:
        check_on_hub(model, given.get("model_revision"))
    except FileNotFoundError as error:
        raise ArgumentError(f"--model_name_or_path: {error}") from error


def _check_data(given: Mapping[str, Any]) -> None:
    sources = [name for name in ("task", "datasets", "dataset_name") if given.get(name)]
    if not sources:
        raise ArgumentError(
            "No data to train on. Pass --task or --dataset_name, or set `datasets` in the config file."
        )
    if given.get("task"):
        from trl_steer.tasks import TASKS

        if given["task"] not in TASKS:
            raise ArgumentError(f"There is no task {given['task']!r}. Choose one of: {', '.join(TASKS)}.")
        if given.get("datasets"):
            raise ArgumentError(
                f"--task {given['task']} and `datasets` cannot be used together. Leave out one of them."
            )
        return
    name = str(given.get("dataset_name") or "")
    if name and reader_of(name) and not Path(name).is_file():
        raise ArgumentError(f"--dataset_name: there is no file {name}.")
    files = [name] if Path(name).is_file() else []
    for file in _files_of_mixture(given.get("datasets")):
        if not Path(file).is_file():
            raise ArgumentError(f"datasets: there is no file {file}.")
        files.append(file)
    for file in files:
        if file.endswith(".jsonl"):
            _check_jsonl(file)


def _files_of_mixture(parts: Any) -> list[str]:
    """Local files in TRL's `datasets`, without patterns and URLs."""
    files: list[str] = []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("path") in READERS.values():
            named = part.get("data_files") or []
            files += [str(file) for file in ([named] if isinstance(named, str) else named)]
    return [file for file in files if not any(mark in file for mark in ("*", "?", "[", "://"))]


def _check_jsonl(path: str) -> None:
    count = 0
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    _check_row(f"{path}, line {number}", line)
                    count += 1
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path} is not UTF-8 text: {error.reason}.") from error
    if not count:
        raise ArgumentError(f"{path} has no rows.")


def _check_row(where: str, line: str) -> None:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{where}: invalid JSON: {error}.") from error
    known = isinstance(row, dict) and (
        {"prompt", "completion"} <= row.keys() or row.keys() & {"messages", "text", "input_ids"}
    )
    if not known:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ArgumentError(
            f"{where}: expected the columns `prompt` and `completion`, `messages`, or `text`, got {found or 'none'}."
        )
