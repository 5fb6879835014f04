"""The settings of a run, and those of a preset in this form."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_steer import presets
from trl_steer.presets import Method

FORMAT = "trl_steer run 1"
# Fields that version 0.1 does not have, and their defaults.
_LATER: dict[str, Any] = {"lora": {}, "dtype": "float32", "keep_weights": True}
# The fields of `Settings` for values of presets. All others are arguments of training.
_FIELDS = {
    "site": ("steering", "site"),
    "positions": ("steering", "positions"),
    "steering_init_scale": ("steering", "init_scale"),
    "lora_alpha": ("lora", "lora_alpha"),
    "lora_dropout": ("lora", "lora_dropout"),
    "lora_target_modules": ("lora", "target_modules"),
}
# Values of presets that are the defaults of the configurations, or of `training.peft_config`. They are left out, so
# that the same adapter has the same settings under every preset.
_DEFAULTS: dict[str, Any] = {
    "steering_init_scale": 1.0,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}


@dataclass(frozen=True)
class Settings:
    """The settings that determine the result of a run. All values can be saved as JSON.

    Args:
        method (`str`): One of [`trl_steer.presets.METHODS`].
        model (`str`): Hub id, checkpoint folder, or [`models.EMBEDDED`].
        benchmark (`str`): The task of `trl_steer.tasks` to train on.
        source (`dict`): Source of the benchmark's dataset, for example the sizes and the seed of a generated one.
        task (`str`, *optional*): The lm-eval task. Without one, the run only trains.
        seed (`int`): Random seed of the initial weights and the order of the examples.
        r (`int`): Rank of LoRA, LoReFT and low-rank steering.
        training (`dict`): Arguments of TRL's `SFTConfig`, or of `JointOrthSFTConfig` for joint methods.
        scoring (`dict`): Arguments of lm-eval: `batch_size`, `gen_kwargs` and `limit`.
        steering (`dict`): Other fields of the configuration of steering, such as `site` and `positions`. For joint
            methods, `r` is the rank of steering, where it is not that of LoRA.
        lora (`dict`): Other fields of [`~peft.LoraConfig`], such as `lora_alpha`.
        dtype (`str`): Type of the base model's parameters in training and evaluation.
        keep_weights (`bool`): Whether the adapter, or the model after full fine-tuning, is kept after evaluation.
    """

    method: Method
    model: str
    benchmark: str
    source: Mapping[str, Any]
    task: str | None
    seed: int
    r: int
    training: Mapping[str, Any]
    scoring: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 1})
    steering: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    keep_weights: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The contents of `settings.json`. Fields that version 0.1 does not have are left out if they have their
        defaults, so that its runs have the same settings."""
        values = asdict(self)
        return {"format": FORMAT, **{name: value for name, value in values.items() if value != _LATER.get(name, ...)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings in the contents of a `settings.json`."""
        return cls(**{name: value for name, value in values.items() if name != "format"})


def of_preset(
    preset: str, method: str, task: str, steering_type: str = "low_rank", site: str | None = None
) -> dict[str, Any]:
    """The fields `r`, `training`, `steering` and `lora` of [`Settings`] for a preset, see [`presets.settings`]."""
    given = presets.settings(preset, method, task, steering_type, site).values
    r = given.pop("steering_r", given.pop("lora_r", 8))
    given.pop("lora_r", None)
    made: dict[str, Any] = {"r": r, "training": {"max_length": None}, "steering": {}, "lora": {}}
    for name, value in given.items():
        if _DEFAULTS.get(name, ...) != value:
            field_name, key = _FIELDS.get(name, ("training", name))
            made[field_name][key] = value
    return made


def with_rate(training: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Arguments of training with another learning rate. Those of the halves of a joint method are scaled with it."""
    before = training["learning_rate"]
    if rate == before:
        return dict(training)
    halves = {name: training[name] for name in ("lora_learning_rate", "steering_learning_rate") if name in training}
    scaled = {name: float(f"{value / before * rate:.6g}") for name, value in halves.items()}
    return {**training, "learning_rate": rate, **scaled}
