"""Checks the arguments of `lm-eval run` and `validate`, before models are imported and all tasks are read."""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trl_steer.checkpoint_names import check_folder, check_on_hub

# lm-eval's models that load `pretrained` with transformers.
_TRANSFORMERS_MODELS = ("hf", "hf-auto", "huggingface")

# lm-eval replaces an unknown device silently, and rejects the others only after loading the model.
_EXPECTED = {
    "batch_size": (r"[1-9]\d*|auto(:[\d.]+)?", "a positive integer, `auto` or `auto:N`"),
    "device": (r"(auto|cpu|cuda|mps|npu|xpu|hpu)(:\d+)?", "cpu, or an accelerator such as cuda, cuda:1 or mps"),
    "dtype": (r"auto|(torch\.)?(b?float16|float32|float64|float|half|double)", "auto, float32, bfloat16 or float16"),
}


class RequestError(ValueError):
    """An invalid request, described in one line."""


def check(arguments: argparse.Namespace) -> None:
    """Checks that the configuration, tasks, model and adapter exist.

    lm-eval checks this too, but up to 15 seconds later and with a traceback.

    Raises:
        RequestError: One of them does not exist, or an option has an invalid value.
    """
    if arguments.command == "validate":
        _check_tasks(arguments.tasks.split(","), arguments.include_path)
    if arguments.command != "run":
        return
    config = _config(arguments)
    tasks = [config.tasks] if isinstance(config.tasks, str) else config.tasks
    if not tasks:
        raise RequestError("There is nothing to evaluate. Pass tasks with --tasks (`lm-eval ls tasks` lists them).")
    _check_tasks([name for task in tasks for name in str(task).split(",")], config.include_path)
    _check_model(config.model, config.model_args)
    given = {**config.model_args, "batch_size": config.batch_size, "device": config.device}
    for option, (pattern, expected) in _EXPECTED.items():
        if given.get(option) is not None and not re.fullmatch(pattern, str(given[option])):
            raise RequestError(f"{option} {given[option]}: expected {expected}.")
    if isinstance(config.samples, str):
        raise RequestError(
            f"--samples {config.samples}: expected JSON, or a JSON file, of tasks and the rows to evaluate."
        )


def _config(arguments: argparse.Namespace) -> Any:
    """The options and the file of `--config` in one, as lm-eval will read them; quietly, since it does so again."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
            return EvaluatorConfig.from_cli(copy.deepcopy(arguments))
    except (ValueError, TypeError, OSError) as error:
        raise RequestError(" ".join(str(error).split())) from error
    finally:
        logging.disable(disabled)


def _check_tasks(names: Sequence[str], include_path: str | Sequence[str] | None) -> None:
    """Checks that each name of a task, group or tag is in a task file. lm-eval checks files, folders and patterns."""
    included = [include_path] if isinstance(include_path, str) else include_path or []
    for folder in included:
        if not Path(folder).is_dir():
            raise RequestError(f"--include_path {folder} does not exist.")
    missing = [name for name in names if re.fullmatch(r"[\w-]+", name) and not Path(name).is_dir()]
    for folder in (*included, str(resources.files("lm_eval") / "tasks")):
        for file in Path(folder).rglob("*.yaml"):
            if not missing:
                return
            text = file.read_text(encoding="utf-8", errors="replace")
            missing = [name for name in missing if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)]
    if missing:
        raise RequestError(f"Tasks not found: {', '.join(missing)}. `lm-eval ls tasks` lists the available ones.")


def _check_model(name: str, model_args: Mapping[str, Any]) -> None:
    import lm_eval.models  # noqa: F401  (registers the names)
    from lm_eval.api.registry import model_registry

    if name not in model_registry:
        choices = ", ".join(sorted(model_registry.keys()))
        raise RequestError(f"There is no type of model named {name!r}. Choose one of: {choices}.")
    if name not in _TRANSFORMERS_MODELS:
        return
    if "pretrained" not in model_args:
        raise RequestError(
            f"--model {name} needs --model_args pretrained=MODEL, a Hub id or the folder of a checkpoint."
        )
    files = {"pretrained": "config.json", "peft": "adapter_config.json"}
    if model_args.keys() & {"gguf_file", "subfolder"}:
        del files["pretrained"]
    named = [(str(model_args[key]), file) for key, file in files.items() if model_args.get(key)]
    try:
        for place, file in named:
            check_folder(place, file)
        for place, file in named:
            check_on_hub(place, model_args.get("revision") if file == "config.json" else None, file)
    except FileNotFoundError as error:
        raise RequestError(f"--model_args: {error}") from error
