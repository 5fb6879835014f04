"""The arguments of `trl-steer sft`: ours and TRL's, checked without importing PyTorch.

Importing TRL takes seconds. Most errors are found without it, because the arguments of TRL and accelerate are read
from their source files.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trl_steer import presets
from trl_steer.choices import SteeringType, first_and_last
from trl_steer.integrations.trl.source_arguments import ArgumentError, launcher_arguments, trl_arguments
from trl_steer.tasks.registry import TASKS


@dataclass
class SteeringArguments:
    """The arguments of `trl-steer sft` in addition to TRL's. See [`PostBlockSteeringConfig`] for those of the adapter.

    Raises:
        ValueError: `task_rows` is less than 1, or `positions` has an invalid value.
    """

    _argument_group_name = "steering"

    method: presets.Method = field(
        default="low_rank",
        metadata={"help": "; ".join(f"{name}: {what}" for name, what in presets.METHODS.items()) + "."},
    )
    preset: presets.Preset = field(
        default="default",
        metadata={
            "help": "Values of settings that are not given. "
            + "; ".join(f"{name}: {what}" for name, what in presets.PRESETS.items())
            + ". --dry_run prints them, and which are guessed."
        },
    )
    steering_type: SteeringType = field(
        default="low_rank", metadata={"help": "Type of steering for --method sublayer, joint and joint_orth."}
    )
    site: presets.Site = field(
        default="post_mlp",
        metadata={
            "help": "The site in a block: pre_mlp, post_mlp or post_attn for --method sublayer; post_block (its "
            "default) or post_mlp for loreft."
        },
    )
    positions: str = field(
        default="all",
        metadata={
            "help": "The tokens to steer: all, last_prompt, or the first and last n of the prompt, such as f7+l7."
        },
    )
    steering_r: int = field(default=8, metadata={"help": "Rank of low-rank steering and of LoReFT."})
    steering_activation: str | None = field(
        default=None,
        metadata={"help": "Activation of low-rank steering and of LoReFT, such as 'silu' (default: none, linear)."},
    )
    steering_scaling: float = field(default=1.0, metadata={"help": "Factor on the steering update."})
    steering_dropout: float = field(
        default=0.0, metadata={"help": "Dropout probability of low-rank steering and of LoReFT."}
    )
    steering_init_scale: float = field(
        default=1.0, metadata={"help": "Factor on the initial down projection of low-rank steering."}
    )
    steering_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks to steer, such as 0 1 2 (default: all)."}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a steering adapter to start from. Its rank, activation, site, positions, "
            "scaling and blocks are those of the new one (default: none)."
        },
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "Train on one of our tasks: " + ", ".join(TASKS) + ". With it, --dataset_name and "
            "--dataset_config are for another copy of its dataset (default: none)."
        },
    )
    task_splits: Literal["default", "steerling"] = field(
        default="default",
        metadata={"help": "'default': the splits of the lm-eval tasks; 'steerling': the splits of the authors' code."},
    )
    task_conversational: bool = field(
        default=False,
        metadata={"help": "Train on chat messages, to evaluate with lm-eval's --apply_chat_template."},
    )
    task_rows: int | None = field(
        default=None, metadata={"help": "Use only the first rows of each split, this many (default: all)."}
    )
    train_end_token: bool = field(
        default=True, metadata={"help": "Whether to end prompt-completion examples with the EOS token."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Only print the settings."})

    def __post_init__(self):
        if self.task_rows is not None and self.task_rows < 1:
            raise ValueError(f"--task_rows must be at least 1, got {self.task_rows}.")
        first_and_last(self.positions)


@dataclass(frozen=True)
class Request:
    """
    The arguments on the command line and in the config file.

    Attributes:
        given (`dict[str, Any]`): All given arguments by name. Those of the command line are strings.
        ours (`SteeringArguments`): Our arguments, with the settings of the preset and defaults.
    """

    given: dict[str, Any]
    ours: SteeringArguments

    @property
    def shows_traceback(self) -> bool:
        """Whether `--debug` was given without a value. With a value, it is an argument of transformers."""
        return self.given.get("debug") is True

    def settings(self) -> presets.Settings:
        """The settings of the preset that were not given."""
        ours = self.ours
        found = presets.settings(ours.preset, ours.method, ours.task, ours.steering_type, self.given.get("site"))
        left_out = {*self.given, *self.unused()}
        return presets.Settings(
            {name: value for name, value in found.values.items() if name not in left_out},
            {name: why for name, why in found.guessed.items() if name not in left_out},
        )

    def unused(self) -> frozenset[str]:
        """Our options that the method does not have."""
        return presets.OPTIONS.difference(presets.options(self.ours.method, self.ours.steering_type))


def read(argv: Sequence[str], **defaults: Any) -> Request:
    """Reads and checks the command line and the config file.

    Args:
        argv (`Sequence[str]`): The command line.
        defaults: Other defaults of our arguments.

    Raises:
        ArgumentError: An argument is unknown or has an invalid value.
    """
    on_command_line = _read_command_line(argv)
    config = on_command_line.pop("config", None)
    in_file = {} if config is None else _read_config(str(config))
    known, launcher = trl_arguments(), launcher_arguments()
    own = {f.name: f for f in fields(SteeringArguments)}
    for where, names in (("", on_command_line), (f"{config}: ", in_file)):
        for name, value in names.items():
            if name not in own and name not in known and name not in launcher and name != "env":
                raise ArgumentError(f"{where}unknown argument {_flag(name, where)}{_suggestion(name, [*own, *known])}")
            if name in known:
                _check_type(where, name, value, known[name].annotation)
    given = {**defaults, **in_file, **on_command_line}
    try:
        ours = SteeringArguments(**{name: _value(own[name], value) for name, value in given.items() if name in own})
    except (ValueError, TypeError) as error:
        raise ArgumentError(str(error)) from error
    request = Request(given, ours)
    _check_options(request)
    _check_options_of_lora(request)
    _check_site_and_positions(request)
    for name, value in request.settings().values.items():
        if name in own:
            setattr(ours, name, value)
    return request


def _check_options(request: Request) -> None:
    ours, unused = request.ours, request.unused()
    wrong = next((name for name in request.given if name in unused), None)
    if wrong is None:
        return
    if wrong == "orthogonal":
        raise ArgumentError("--orthogonal cannot be used. It is true for --method joint_orth, and false for joint.")
    if wrong in presets.options(ours.method):
        raise ArgumentError(
            f"--{wrong} cannot be used with --steering_type {ours.steering_type}. Leave it out, or use "
            "--steering_type low_rank."
        )
    why = "which does not steer"
    if presets.options(ours.method):
        why = f"only with {', '.join(name for name in presets.METHODS if wrong in presets.options(name))}"
    raise ArgumentError(f"--{wrong} cannot be used with --method {ours.method}, {why}. Leave it out.")


def _check_options_of_lora(request: Request) -> None:
    """Checks TRL's own options of LoRA, which TRL ignores without `--use_peft`."""
    given, method = request.given, request.ours.method
    has_lora = method in ("lora", *presets.JOINT)
    wrong = next((name for name in given if name.startswith("lora_") or name in ("use_rslora", "use_dora")), None)
    if "use_peft" in given and (str(given["use_peft"]).lower() in ("true", "1", "yes")) != has_lora:
        wrong = "use_peft"
    elif has_lora or wrong is None:
        return
    raise ArgumentError(
        f"--{wrong} {given[wrong]} cannot be used with --method {method}, which "
        f"{'trains' if has_lora else 'does not train'} LoRA. Leave it out, and select LoRA with --method lora, joint "
        "or joint_orth."
    )


def _check_site_and_positions(request: Request) -> None:
    given, method = request.given, request.ours.method
    if "site" in given and request.ours.site not in presets.SITES[method]:
        choices = "; ".join(f"{', '.join(sites)} with --method {name}" for name, sites in presets.SITES.items())
        raise ArgumentError(f"--site {request.ours.site} cannot be used with --method {method}. There are {choices}.")
    positions = {**request.settings().values, **given}.get("positions", "all")
    if positions == "all":
        return
    for name in ("packing", "padding_free"):
        if name in given and _bool(name, given[name]):
            raise ArgumentError(
                f"--positions {positions} cannot be used with --{name}, whose rows contain several prompts."
            )


def _read_command_line(argv: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif name is None:
            raise ArgumentError(f"Unexpected {word!r}. Arguments start with --.")
        elif found[name] is True:
            found[name] = word
        else:
            found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), word]
    return found


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"Can't read --config {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--config {path} is not a text file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ArgumentError(f"{path}{line}: invalid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ArgumentError(f"{path} must contain arguments, one `name: value` per line.")
    return values


def _value(own: Any, value: Any) -> Any:
    """The value of one of our arguments, converted to its type."""
    annotation, allowed = annotation_of(own.name), choices(own.name)
    if allowed:
        if value not in allowed:
            raise ArgumentError(f"{own.name} must be one of {', '.join(allowed)}, got {value!r}.")
        return value
    if value is None:
        if "None" not in annotation:
            raise ArgumentError(f"{own.name} needs a value.")
        return None
    if annotation.startswith("list[int]"):
        return [_number(own.name, item, int) for item in (value if isinstance(value, list) else [value])]
    if annotation.startswith("bool"):
        return _bool(own.name, value)
    if value is True or isinstance(value, (list, dict)):
        raise ArgumentError(f"{own.name} needs one value, got {value!r}.")
    if annotation.startswith("int"):
        return _number(own.name, value, int)
    return _number(own.name, value, float) if annotation.startswith("float") else str(value)


def annotation_of(name: str) -> str:
    """The type of one of our arguments as in the source, because transformers' parser changes the types of fields."""
    return SteeringArguments.__annotations__[name]


def choices(name: str) -> list[str]:
    """The values of one of our arguments whose type is a `Literal`, otherwise none."""
    hint = get_type_hints(SteeringArguments)[name]
    return list(get_args(hint)) if get_origin(hint) is Literal else []


def _check_type(where: str, name: str, value: Any, annotation: str) -> None:
    plain = annotation.replace("Optional[", "").replace("]", "").replace(" ", "").removesuffix("|None")
    name = where + name
    if isinstance(value, list) and not any(part in annotation for part in ("list", "tuple", "Sequence", "Any")):
        raise ArgumentError(f"{name} takes one value, got {' '.join(map(str, value))}.")
    if not isinstance(value, (str, int, float)):
        return
    if plain in ("int", "float"):
        _number(name, value, int if plain == "int" else float)
    elif plain == "bool":
        _bool(name, value)


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError
        return kind(float(value)) if kind is int else float(value)
    except (TypeError, ValueError, OverflowError):
        what = "an integer" if kind is int else "a number"
        raise ArgumentError(f"{name} must be {what}, got {value!r}.") from None


def _bool(name: str, value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False, "n": False}
    if str(value).lower() not in words:
        raise ArgumentError(f"{name} must be true or false, got {value!r}.")
    return words[str(value).lower()]


def _flag(name: str, where: str) -> str:
    return name if where else f"--{name}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else "; see --help for all arguments."
