"""The arguments of TRL's `sft` script and of `accelerate launch`, read from their source files.

Importing TRL takes seconds, and errors in arguments should be shown without delay.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path


class ArgumentError(ValueError):
    """An argument is unknown or has an invalid value."""


@dataclass(frozen=True)
class Argument:
    """The annotation and the help of an argument, as in the source."""

    annotation: str
    help: str


def trl_arguments() -> dict[str, Argument]:
    """The arguments of TRL's `sft` script, and the fields of [`JointOrthSFTConfig`]."""
    trl, transformers = _folder("trl"), _folder("transformers")
    found: dict[str, Argument] = {}
    for path in (
        transformers / "training_args.py",
        trl / "trainer" / "base_config.py",
        trl / "trainer" / "sft_config.py",
        _folder("trl_steer") / "trainers" / "joint_orth_sft_config.py",
        trl / "trainer" / "model_config.py",
        trl / "scripts" / "utils.py",
    ):
        if path.is_file():
            found |= _dataclass_fields(path)
    return found


def launcher_arguments() -> set[str]:
    """The options of `accelerate launch`, and TRL's `--accelerate_config`."""
    source = (_folder("accelerate") / "commands" / "launch.py").read_text(encoding="utf-8")
    return {"accelerate_config"} | {
        str(argument.value).removeprefix("--")
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")
    }


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ArgumentError(f"The package {package} is not installed. Run `pip install {package}`.")
    return Path(next(iter(spec.submodule_search_locations)))


def _dataclass_fields(path: Path) -> dict[str, Argument]:
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name in ("DatasetConfig",):
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found[line.target.id] = Argument(ast.unparse(line.annotation), _help(line.value))
    return found


def _help(value: ast.expr | None) -> str:
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Dict):
            for key, text in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    return "".join(str(c.value) for c in ast.walk(text) if isinstance(c, ast.Constant))
    return ""
