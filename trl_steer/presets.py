"""Presets: the hyperparameters of `trl-steer sft`, `trl-steer joint`, the demo and study files.

- `default`: the best values on the demo's task.
- `paper`: arXiv 2603.00425, appendix F. The published text lacks its tables of learning rates and some other values;
  their replacements are marked as guessed.
- `steerling`: the defaults of the authors' code, including its schedule of projections.

Settings have the names of command-line arguments: those of TRL's configurations, and ours for the adapter.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from trl_steer.choices import LoReftSite, SteeringType, SublayerSite

Preset = Literal["default", "paper", "steerling"]
AdapterMethod = Literal["low_rank", "vector", "sublayer", "loreft", "lofit", "jola", "lora", "joint", "joint_orth"]
Method = Literal[AdapterMethod, "full"]
Site = Literal[LoReftSite, SublayerSite]

PRESETS: dict[Preset, str] = {
    "default": "the best values on the demo's task",
    "paper": "the setup in the paper's appendix F, with guesses for the values that its text lacks",
    "steerling": "the defaults of the authors' code, including its schedule of projections",
}
METHODS: dict[Method, str] = {
    "low_rank": "low-rank post-block steering",
    "vector": "one steering vector per block",
    "sublayer": "steering inside the blocks, at --site",
    "loreft": "LoReFT, an edit of the hidden state in a learned subspace",
    "lofit": "LoFiT, an offset for each attention head",
    "jola": "JoLA, gated offsets and factors for each attention head",
    "lora": "LoRA on all linear layers of the blocks",
    "joint": "LoRA and post-block steering trained together",
    "joint_orth": "the same, in orthogonal output subspaces",
    "full": "full fine-tuning, without an adapter",
}
STEERING_TYPES = get_args(SteeringType)
JOINT = ("joint", "joint_orth")
# The sites of the methods that have several.
SITES: dict[str, tuple[str, ...]] = {"sublayer": get_args(SublayerSite), "loreft": get_args(LoReftSite)}

_STEERING = ("positions", "steering_scaling", "steering_layers", "init_from")
_LOW_RANK = ("steering_r", "steering_activation", "steering_dropout", "steering_init_scale")
_HALVES = ("lora_learning_rate", "steering_learning_rate", "steering_weight_decay")
_PROJECTION = (
    *("orthogonal_side", "orthogonal_every", "orthogonal_before_step", "orthogonal_at_end"),
    *("orthogonal_gradients", "orthogonal_norms", "orthogonal_modules"),
)
# Our options that only some methods have, by method. See `options`.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "low_rank": (*_STEERING, *_LOW_RANK),
    "vector": _STEERING,
    "sublayer": ("steering_type", "site", *_STEERING, *_LOW_RANK),
    "loreft": ("site", *_STEERING, "steering_r", "steering_activation", "steering_dropout"),
    "lofit": _STEERING,
    "jola": _STEERING,
    "lora": (),
    "joint": ("steering_type", *_STEERING, *_LOW_RANK, *_HALVES),
    "joint_orth": ("steering_type", *_STEERING, *_LOW_RANK, *_HALVES, *_PROJECTION),
    "full": (),
}
# All of them. `orthogonal` is that of the configuration, which --method sets.
OPTIONS = frozenset({"orthogonal"}.union(*_OPTIONS.values()))


class Settings(NamedTuple):
    """
    The settings of a preset for one method and task.

    Attributes:
        values (`dict[str, Any]`): Values by the name of the command-line argument.
        guessed (`dict[str, str]`): Reasons for the values that are not given by the preset's source.
    """

    values: dict[str, Any]
    guessed: dict[str, str]


def _given(**values: Any) -> Settings:
    return Settings(values, {})


def _guess(why: str, **values: Any) -> Settings:
    return Settings(values, dict.fromkeys(values, why))


def _joined(*parts: Settings) -> Settings:
    """All parts, of which later ones go before earlier ones."""
    values: dict[str, Any] = {}
    guessed: dict[str, str] = {}
    for part in parts:
        values |= part.values
        guessed = {name: why for name, why in guessed.items() if name not in part.values} | part.guessed
    return Settings(values, guessed)


# LoRA's targets in the authors' code: all linear layers of a Llama block.
SEVEN_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LORA: dict[str, Any] = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
_PAPER_SITE = {"site": "post_mlp"}
_PAPER_POSITIONS = {**_PAPER_SITE, "positions": "last_prompt"}
_SMALL = {"steering_init_scale": 1e-3}

# default
_LORA_HERE = _given(**_LORA, lora_target_modules="all-linear")
_FULL_SIZE = _given(steering_init_scale=1.0)
_JOINT_HERE = _joined(_given(learning_rate=1e-3, steering_learning_rate=2e-3), _LORA_HERE, _FULL_SIZE)

# paper
_GRID = "the paper's text lacks the grid; this is the middle of the grid in an earlier write-up by its authors"
_HIGH_GRID = "the paper's text lacks the grid, which is higher for vectors; this is its upper end"
_CONSTANT = _given(lr_scheduler_type="constant", warmup_steps=0.0)
_WARM = _joined(
    _given(lr_scheduler_type="cosine"),
    _guess("the paper's text lacks the warm-up ratio; this is from the authors' code", warmup_steps=0.03),
)
_SMALL_GUESS = _guess("the paper does not give it; this is from the authors' code", **_SMALL)
_LORA_GUESS = _joined(
    _guess(
        "the paper does not give LoRA's alpha and targets; these are from the authors' code",
        **_LORA,
        lora_target_modules=SEVEN_MODULES,
    ),
    _given(lora_r=8),
)
_BASELINE = _joined(_CONSTANT, _guess(_GRID, learning_rate=2e-3))
_JOINT_RATES: dict[str, Any] = {
    "learning_rate": 2e-4,
    "steering_learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.06,
}
_JOINT_GUESS = _joined(
    _guess("the paper does not give it for joint training; this is from the authors' code", **_JOINT_RATES),
    _SMALL_GUESS,
    _LORA_GUESS,
)

# steerling
_RATE_OF_CODE = 9e-4
_NOT_STEERING = _guess("the default of the code is meant for steering", learning_rate=_RATE_OF_CODE)
_LORA_OF_CODE = _given(**_LORA, lora_target_modules=SEVEN_MODULES)
_JOINT_OF_CODE = _joined(_given(**_JOINT_RATES, **_SMALL), _LORA_OF_CODE)
_BASELINE_OF_CODE = _guess(
    "the authors' code does not have this method; this is its default for steering", learning_rate=_RATE_OF_CODE
)
_SITE_OF_PAPER = _guess("the authors' code does not have this method; as in the paper", **_PAPER_POSITIONS)
_PROJECTION_OF_CODE = _given(
    orthogonal_side="input",
    orthogonal_every=100,
    orthogonal_before_step=True,
    orthogonal_at_end=False,
    orthogonal_gradients=False,
    orthogonal_norms=False,
)

_ALWAYS = _given(optim="adamw_torch_fused", weight_decay=0.0)
# Of every method, before those in `_SETTINGS`.
_BY_PRESET: dict[str, Settings] = {
    "default": _given(lr_scheduler_type="cosine", warmup_steps=0.1, per_device_train_batch_size=4),
    "paper": _given(per_device_train_batch_size=8),
    "steerling": _given(
        learning_rate=_RATE_OF_CODE,
        lr_scheduler_type="linear",
        warmup_steps=0.03,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        bf16=False,
        fp16=False,
        train_end_token=False,
    ),
}
_SETTINGS: dict[str, dict[str, Settings]] = {
    "default": {
        "low_rank": _joined(_given(learning_rate=2e-3), _FULL_SIZE),
        "vector": _joined(_given(learning_rate=1e-2), _FULL_SIZE),
        "sublayer": _joined(_given(learning_rate=2e-3, **_PAPER_SITE), _FULL_SIZE),
        "loreft": _given(learning_rate=5e-4, site="post_block", positions="all"),
        "lofit": _given(learning_rate=1e-2),
        "jola": _given(learning_rate=5e-3),
        "lora": _joined(_given(learning_rate=1e-3), _LORA_HERE),
        "joint": _JOINT_HERE,
        "joint_orth": _JOINT_HERE,
        "full": _given(learning_rate=1e-4),
    },
    "paper": {
        "low_rank": _joined(_BASELINE, _SMALL_GUESS),
        "vector": _joined(_CONSTANT, _guess(_HIGH_GRID, learning_rate=5e-3), _SMALL_GUESS),
        "sublayer": _joined(_BASELINE, _SMALL_GUESS, _given(**_PAPER_SITE)),
        "loreft": _joined(_BASELINE, _given(**_PAPER_POSITIONS)),
        "lofit": _BASELINE,
        "jola": _BASELINE,
        "lora": _joined(_guess(_GRID, learning_rate=3e-4), _WARM, _LORA_GUESS),
        "joint": _JOINT_GUESS,
        "joint_orth": _JOINT_GUESS,
        "full": _joined(_guess(_GRID, learning_rate=2e-5), _WARM),
    },
    "steerling": {
        "low_rank": _given(**_SMALL),
        "vector": _given(**_SMALL),
        "sublayer": _given(**_SMALL, **_PAPER_SITE),
        "loreft": _joined(_BASELINE_OF_CODE, _SITE_OF_PAPER),
        "lofit": _BASELINE_OF_CODE,
        "jola": _BASELINE_OF_CODE,
        "lora": _joined(_NOT_STEERING, _LORA_OF_CODE),
        "joint": _JOINT_OF_CODE,
        "joint_orth": _joined(_JOINT_OF_CODE, _PROJECTION_OF_CODE),
        "full": _NOT_STEERING,
    },
}
# What is different with `steering_type="vector"`, for methods that have it.
_WITH_VECTORS: dict[str, dict[str, Settings]] = {
    "default": {
        "sublayer": _given(learning_rate=1e-2),
        "joint": _given(steering_learning_rate=1e-2),
        "joint_orth": _given(steering_learning_rate=1e-2),
    },
    "paper": {"sublayer": _guess(_HIGH_GRID, learning_rate=5e-3)},
    "steerling": {},
}
# What is different at a site that is not the preset's own.
_AT_SITE: dict[tuple[str, str, str | None], Settings] = {
    ("default", "loreft", "post_mlp"): _given(learning_rate=2e-3),
}


def settings(
    preset: str, method: str, task: str | None = None, steering_type: str = "low_rank", site: str | None = None
) -> Settings:
    """
    The settings of a preset.

    Args:
        preset (`str`): One of [`PRESETS`].
        method (`str`): One of [`METHODS`].
        task (`str`, *optional*): Name of a benchmark, which determines the number of epochs and the maximum length.
        steering_type (`str`, defaults to `"low_rank"`): The type of steering with `method="sublayer"` and joint
            training. Ignored for other methods.
        site (`str`, *optional*): The site that is used instead of the preset's, of a method that has several.

    Raises:
        ValueError: There is no such preset, method or type.
    """
    for name, value, known in (
        ("preset", preset, PRESETS),
        ("method", method, METHODS),
        ("steering_type", steering_type, STEERING_TYPES),
    ):
        if value not in known:
            raise ValueError(f"Expected {name} to be one of {', '.join(map(repr, known))}, got {value!r}.")
    parts = [_ALWAYS, _BY_PRESET[preset], _SETTINGS[preset][method]]
    if steering_type == "vector":
        parts.append(_WITH_VECTORS[preset].get(method, _given()))
    parts.append(_AT_SITE.get((preset, method, site), _given()))
    return _joined(*parts, _of_task(preset, method, task, steering_type))


def _of_task(preset: str, method: str, task: str | None, steering_type: str) -> Settings:
    """What depends on the task. Without one, the number of epochs is TRL's."""
    values: dict[str, Any] = {}
    if task is not None:
        values["num_train_epochs"] = 3.0 if task in ("gsm8k", "alpaca") else 1.0
    if preset == "paper" and task == "alpaca":
        values |= {"max_length": 512, "gradient_accumulation_steps": 2}
        if method not in ("lora", "full", *JOINT):
            values["learning_rate"] = 2e-3
            if "steering_r" in options(method, steering_type):
                values["steering_r"] = 16
    if preset == "steerling":
        values["max_length"] = 512 if task in ("aqua", "listops", "alpaca") else 256
        if task == "alpaca":
            values |= {"lr_scheduler_type": "cosine", "bf16": True}
        elif task is not None:
            values["task_splits"] = "steerling"
    return _given(**values)


def options(method: str, steering_type: str = "low_rank") -> tuple[str, ...]:
    """Those of [`OPTIONS`] that a method has.

    Args:
        method (`str`): One of [`METHODS`].
        steering_type (`str`, defaults to `"low_rank"`): The type of steering, for methods that have several.
    """
    found = _OPTIONS[method]
    if "steering_type" in found and steering_type == "vector":
        found = tuple(name for name in found if name not in _LOW_RANK)
    return found


def peft_config(method: str, lora: Any = None, **fields: Any) -> Any:
    """
    The configuration of the adapter of a method.

    Args:
        method (`str`): One of [`METHODS`] but `"full"`.
        lora ([`~peft.LoraConfig`], *optional*): That of LoRA, which is returned for `"lora"` and is half of the
            configuration for joint training.
        fields: Fields of the steering configuration, for any method; those that it does not have are left out.
    """
    from dataclasses import fields as fields_of

    from trl_steer.tuners.joint_steering import JointSteeringConfig

    if method == "lora":
        return lora
    config_class = steering_class(method)
    if method in STEERING_TYPES:
        fields["steering_type"] = method
    known = {field.name for field in fields_of(config_class)}
    steering = config_class(**{name: value for name, value in fields.items() if name in known})
    return JointSteeringConfig.from_parts(lora, steering) if method in JOINT else steering


def steering_class(method: str) -> Any:
    """The class of the configuration of steering of a method, which for joint training is that of its half."""
    from trl_steer.tuners.jola import JolaConfig
    from trl_steer.tuners.lofit import LofitConfig
    from trl_steer.tuners.loreft import LoReftConfig
    from trl_steer.tuners.post_block_steering import PostBlockSteeringConfig
    from trl_steer.tuners.sublayer_steering import SublayerSteeringConfig

    classes = {"sublayer": SublayerSteeringConfig, "loreft": LoReftConfig, "lofit": LofitConfig, "jola": JolaConfig}
    return classes.get(method, PostBlockSteeringConfig)
