"""Presets: the hyperparameters of `trl-steer sft`, `trl-steer joint`, the demo and study files.

- `default`: the best values on the demo's task.
- `paper`: arXiv 2603.00425, appendix F. The published text lacks its tables of learning rates and some other values;
  their replacements are marked as guessed.
- `steerling`: the defaults of the authors' code, including its schedule of projections.

Settings have the names of command-line arguments: those of TRL's configurations, and ours for the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PRESETS = {
    "default": "the best values on the demo's task",
    "paper": "the setup in the paper's appendix F, with guesses for the values that its text lacks",
    "steerling": "the defaults of the authors' code, including its schedule of projections",
}
METHODS = {
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
STEERING_TYPES = ("low_rank", "vector")
JOINT = ("joint", "joint_orth")
# The sites of the methods that have several.
SITES = {"sublayer": ("pre_mlp", "post_mlp", "post_attn"), "loreft": ("post_block", "post_mlp")}
# Methods whose update starts with a down projection, or is a vector.
ADDITIVE = (*STEERING_TYPES, "sublayer", *JOINT)

# LoRA's targets in the authors' code: all linear layers of a Llama block.
SEVEN_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_GRID = "the paper's text lacks the grid; this is the middle of the grid in an earlier write-up by its authors"
_WARMUP = "the paper's text lacks the warm-up ratio; this is from the authors' code"
_NOT_IN_CODE = "the authors' code does not have this method; this is its default for steering"
_LORA = "the paper does not give LoRA's alpha and targets; these are from the authors' code"


class Settings(NamedTuple):
    """
    The settings of a preset for one method and task.

    Attributes:
        values (`dict[str, Any]`): Values by the name of the command-line argument.
        guessed (`dict[str, str]`): Reasons for the values that are not given by the preset's source.
    """

    values: dict[str, Any]
    guessed: dict[str, str]


def settings(preset: str, method: str, task: str | None = None, steering_type: str = "low_rank") -> Settings:
    """
    The settings of a preset.

    Args:
        preset (`str`): One of [`PRESETS`].
        method (`str`): One of [`METHODS`].
        task (`str`, *optional*): Name of a benchmark, which determines the number of epochs and the maximum length.
        steering_type (`str`, defaults to `"low_rank"`): The type of steering with `method="sublayer"` and joint
            training.

    Raises:
        ValueError: There is no such preset, method or type.
    """
    for name, value, known in (
        ("preset", preset, PRESETS),
        ("method", method, METHODS),
        ("steering_type", steering_type, STEERING_TYPES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if method in STEERING_TYPES:
        steering_type = method
    found = {"default": _default, "paper": _paper, "steerling": _steerling}[preset](method, task, steering_type)
    return Settings({"optim": "adamw_torch_fused", "weight_decay": 0.0, **found.values}, found.guessed)


def _epochs(task: str | None) -> dict[str, Any]:
    """Without a task, TRL's default is used."""
    if task is None:
        return {}
    return {"num_train_epochs": {"gsm8k": 3.0, "alpaca": 3.0}.get(task, 1.0)}


def _default(method: str, task: str | None, steering_type: str) -> Settings:
    steering = {"low_rank": 2e-3, "vector": 1e-2}[steering_type]
    lora = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    rates: Mapping[str, dict[str, Any]] = {
        "lora": {"learning_rate": 1e-3, **lora},
        "joint": {"learning_rate": 1e-3, "steering_learning_rate": steering, **lora},
        "full": {"learning_rate": 1e-4},
        "sublayer": {"learning_rate": steering, "site": "post_mlp"},
        "loreft": {"learning_rate": 2e-3, "site": "post_block", "positions": "all"},
        "lofit": {"learning_rate": 1e-2},
        "jola": {"learning_rate": 5e-3},
    }
    values = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 4,
        **_epochs(task),
        **rates.get("joint" if method in JOINT else method, {"learning_rate": steering}),
    }
    if method in ADDITIVE:
        values["steering_init_scale"] = 1.0
    return Settings(values, {})


def _paper(method: str, task: str | None, steering_type: str) -> Settings:
    values: dict[str, Any] = {"per_device_train_batch_size": 8, **_epochs(task)}
    guessed = {"learning_rate": _GRID}
    if method in ("lora", "full"):
        values |= {"learning_rate": {"lora": 3e-4, "full": 2e-5}[method]}
        values |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.03}
        guessed["warmup_steps"] = _WARMUP
    elif method in JOINT:
        values |= {"learning_rate": 2e-4, "steering_learning_rate": 2e-4}
        values |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.06}
        why = "the paper does not give it for joint training; this is from the authors' code"
        guessed = dict.fromkeys(("learning_rate", "steering_learning_rate", "lr_scheduler_type", "warmup_steps"), why)
    else:
        values |= {"learning_rate": {"low_rank": 2e-3, "vector": 5e-3}[steering_type]}
        values |= {"lr_scheduler_type": "constant", "warmup_steps": 0.0}
        if steering_type == "vector":
            guessed["learning_rate"] = (
                "the paper's text lacks the grid, which is higher for vectors; this is its upper end"
            )
    if method in ADDITIVE:
        values["steering_init_scale"] = 1e-3
        guessed["steering_init_scale"] = "the paper does not give it; this is from the authors' code"
    if method == "loreft":
        values |= {"site": "post_mlp", "positions": "last_prompt"}
    elif method == "sublayer":
        values["site"] = "post_mlp"
    if method in ("lora", *JOINT):
        values |= {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": SEVEN_MODULES}
        guessed |= dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules"), _LORA)
    if task == "alpaca":
        values |= {"max_length": 512, "gradient_accumulation_steps": 2}
        if method not in ("lora", "full", *JOINT):
            values |= {"learning_rate": 2e-3, "steering_r": 16}
            guessed.pop("learning_rate")
    return Settings(values, guessed)


def _steerling(method: str, task: str | None, steering_type: str) -> Settings:
    values: dict[str, Any] = {
        "learning_rate": 9e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        **_epochs(task),
        "max_length": 512 if task in ("aqua", "listops", "alpaca") else 256,
        "bf16": False,
        "fp16": False,
        "train_end_token": False,
    }
    guessed: dict[str, str] = {}
    if task == "alpaca":
        values |= {"lr_scheduler_type": "cosine", "bf16": True}
    elif task is not None:
        values["task_splits"] = "steerling"
    if method in JOINT:
        values |= {"learning_rate": 2e-4, "steering_learning_rate": 2e-4}
        values |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.06}
    if method == "joint_orth":
        values |= {
            "orthogonal_side": "input",
            "orthogonal_every": 100,
            "orthogonal_before_step": True,
            "orthogonal_at_end": False,
            "orthogonal_gradients": False,
            "orthogonal_norms": False,
        }
    if method in ("lora", *JOINT):
        values |= {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": SEVEN_MODULES}
    if method in ADDITIVE:
        values |= {"steering_init_scale": 1e-3}
    elif method in ("lora", "full"):
        guessed["learning_rate"] = "the default of the code is meant for steering"
    else:
        guessed["learning_rate"] = _NOT_IN_CODE
    if method == "loreft":
        values |= {"site": "post_mlp", "positions": "last_prompt"}
        guessed |= dict.fromkeys(("site", "positions"), "the authors' code does not have this method; as in the paper")
    elif method == "sublayer":
        values["site"] = "post_mlp"
    return Settings(values, guessed)


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
    from trl_steer.tuners.jola import JolaConfig
    from trl_steer.tuners.lofit import LofitConfig
    from trl_steer.tuners.loreft import LoReftConfig
    from trl_steer.tuners.post_block_steering import PostBlockSteeringConfig
    from trl_steer.tuners.sublayer_steering import SublayerSteeringConfig

    if method == "lora":
        return lora
    classes = {"sublayer": SublayerSteeringConfig, "loreft": LoReftConfig, "lofit": LofitConfig, "jola": JolaConfig}
    config_class: Any = classes.get(method, PostBlockSteeringConfig)
    if method in STEERING_TYPES:
        fields["steering_type"] = method
    known = {field.name for field in fields_of(config_class)}
    steering = config_class(**{name: value for name, value in fields.items() if name in known})
    return JointSteeringConfig.from_parts(lora, steering) if method in JOINT else steering
