"""The output of `trl-steer sft --help` and `--dry_run`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import yaml

from trl_steer import presets
from trl_steer.integrations.trl.arguments import Request, SteeringArguments, annotation_of, choices
from trl_steer.integrations.trl.source_arguments import trl_arguments


def help_text(prog: str, method: str | None = None) -> str:
    """The output of `--help`. `method` is the default of `--method`, if the command has another one."""
    lines = [
        f"usage: {prog} --model_name_or_path MODEL --output_dir DIR (--task TASK | --dataset_name DATA) [arguments]",
        "",
        "Fine-tunes a model with TRL's SFTTrainer: steering, LoRA, both together, or all parameters.",
        "--config FILE.yaml reads arguments from a file, as `name: value`; the command line takes precedence. With",
        "options of `accelerate launch` (--num_processes 2, --accelerate_config fsdp2), it runs under the launcher.",
        "",
        "Data: --task, or --dataset_name with a Hub id or a file (.jsonl, .json, .csv, .parquet) whose rows have",
        "`prompt` and `completion`, `messages`, or `text`.",
        "",
        "arguments of trl-steer:",
    ]
    for own in fields(SteeringArguments):
        default = method if own.name == "method" and method else own.default
        shown = "" if default in (None, MISSING) else f" (default: {default})"
        lines += _entry(f"--{own.name} {'|'.join(choices(own.name)) or _metavar(annotation_of(own.name))}", own, shown)
    lines += ["  --debug", "      Show the traceback of an error (default: False)."]
    lines += ["", "defaults that depend on the method (--preset default):"]
    for name in [method] if method else presets.METHODS:
        values = Request({}, SteeringArguments(method=name)).settings().values
        lines.append(f"  {name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()))
    lines += [
        "",
        "metrics of joint training: lora_norm and steering_norm, the norms of the parameters; steering_overlap, the",
        "largest max |Q^T W| / ||W|| of a block before projections (0: orthogonal); steering_norm_kept, the smallest",
        "ratio of the norms of W after and before a projection.",
        "",
        "TRL's arguments (see `trl sft --help` for their descriptions and defaults):",
    ]
    lines += _wrapped(sorted(trl_arguments()))
    return "\n".join(lines)


def _entry(name: str, own: Any, shown: str) -> list[str]:
    text = own.metadata["help"] + shown
    return [f"  {name}", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _metavar(annotation: str) -> str:
    return {"bool": "true|false", "int": "N", "float": "X", "list": "N ...", "str": "NAME"}[
        annotation.split("[")[0].split(" ")[0]
    ]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(names: Sequence[str]) -> list[str]:
    return textwrap.wrap(" ".join(f"--{name}" for name in names), 110, initial_indent="  ", subsequent_indent="  ")


def dry_run(request: Request) -> str:
    """All settings as YAML: those given, those of the preset, and which of them are guessed."""
    settings = request.settings()
    own = {f.name: getattr(request.ours, f.name) for f in fields(SteeringArguments) if f.name not in request.unused()}
    values = {**settings.values, **{k: _plain(v) for k, v in request.given.items()}, **own}
    shown: dict[str, Any] = {k: v for k, v in sorted(values.items()) if k not in ("config", "debug", "dry_run")}
    if settings.guessed:
        shown["guessed"] = settings.guessed
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    """A value of the command line as in a config file. JSON first, because YAML reads 3e-4 as a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return yaml.safe_load(value)
