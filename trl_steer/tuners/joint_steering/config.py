"""Configuration of joint adaptation: LoRA and post-block steering in one adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType

from ..post_block_steering.config import PostBlockSteeringConfig
from ..steering.card import ModelCardMixin
from ..steering.config import check_choice, check_number, is_integer

# The fields of `JointSteeringConfig.steering`. The other fields of PostBlockSteeringConfig (`modules_to_save`, the
# base model, ...) apply to the whole adapter and are at the top level.
STEERING_FIELDS = tuple(
    f.name
    for f in fields(PostBlockSteeringConfig)
    if f.name not in {base.name for base in fields(PeftConfig)} | {"modules_to_save", "trainable_token_indices"}
)


@dataclass
class JointSteeringConfig(ModelCardMixin, LoraConfig):
    """
    Configuration of a [`JointSteeringModel`]: LoRA on the linear layers inside the blocks and post-block steering on
    the blocks, trained together.

    The options of [`~peft.LoraConfig`] are at the top level, with their usual meanings and defaults, except that
    `target_modules` defaults to all linear layers inside the blocks. The options of steering are in the dictionary
    `steering`.

    [`JointOrthSFTTrainer`] keeps the outputs of LoRA and of steering in orthogonal subspaces. It constrains the column
    space of LoRA's `B`. This covers all of LoRA's output if its update is `B A`, or a variant that changes `A` or
    inserts a matrix between `B` and `A` (`use_rslora`, `use_qalora`, `use_bdlora`, `kasa_config`, `monteclora_config`,
    `alora_...`). It does not cover the rescaling of DoRA (`use_dora=True`), the constant of `lora_bias=True`, or
    biases of the base model that are trained (`bias="all"` or `"lora_only"`).

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), sections 4.1 and 5.2.

    Args:
        steering (`dict` or [`PostBlockSteeringConfig`], *optional*):
            The options of steering, a dictionary of [`PostBlockSteeringConfig`]'s fields: `r`, `steering_type`,
            `rank_pattern`, `activation`, `scaling`, `dropout`, `init_weights`, `init_scale`, `init_from`,
            `positions`, `target_modules`, `exclude_modules`, `layers_to_transform`, `base_model_type`. Missing fields
            have their defaults.
        kwargs: The fields of [`~peft.LoraConfig`].

    Raises:
        ValueError: `steering` has an unknown field or a value that is invalid for [`PostBlockSteeringConfig`], or a
            field of LoRA has an invalid value.
        TypeError: `steering` is neither a dictionary nor a [`PostBlockSteeringConfig`], or a field has a value of the
            wrong type.
    """

    steering: dict[str, Any] | PostBlockSteeringConfig = field(
        default_factory=dict, metadata={"help": "Options of steering: fields of PostBlockSteeringConfig."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["JOINT_STEERING"]  # added by trl_steer.registration
        check_lora_fields(self)
        if isinstance(self.steering, PostBlockSteeringConfig):
            self.steering = steering_dict(self.steering)
        if not isinstance(self.steering, dict):
            raise TypeError(
                "steering must be a PostBlockSteeringConfig or a dictionary of its fields, got "
                f"{self.steering!r} of type {type(self.steering).__name__}."
            )
        unknown = sorted(set(self.steering) - set(STEERING_FIELDS))
        if unknown:
            raise ValueError(f"steering has unknown fields {unknown}; use {sorted(STEERING_FIELDS)}.")
        self.steering = steering_dict(PostBlockSteeringConfig(**self.steering))

    @classmethod
    def from_parts(
        cls, lora: LoraConfig, steering: PostBlockSteeringConfig | dict | None = None
    ) -> JointSteeringConfig:
        """
        Creates a joint configuration from a LoRA and a steering configuration.

        Args:
            lora ([`~peft.LoraConfig`]): The LoRA configuration, whose fields are at the top level of the result.
            steering ([`PostBlockSteeringConfig`] or `dict`, *optional*): The options of steering. Default: defaults.

        Raises:
            ValueError:
                Both have `modules_to_save`, `trainable_token_indices`, a task type or a base model, with different
                values.
            TypeError: `lora` is not a LoRA configuration, or it is a joint one.
        """
        if not isinstance(lora, LoraConfig) or isinstance(lora, cls):
            raise TypeError(f"lora must be a LoraConfig, got {type(lora).__name__}.")
        values = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        if isinstance(steering, PostBlockSteeringConfig):
            for name in ("modules_to_save", "trainable_token_indices", "task_type", "base_model_name_or_path"):
                ours, theirs = values.get(name), getattr(steering, name)
                if ours and theirs and ours != theirs:
                    raise ValueError(
                        f"The LoRA and the steering configuration have different {name}: {ours} and {theirs}. Set it "
                        "in one of them, or to the same value in both."
                    )
                values[name] = ours or theirs
        return cls(**values, steering={} if steering is None else steering)

    def to_dict(self) -> dict[str, Any]:
        """As in [`~peft.PeftConfig`], for saving. Without the `init_from` of steering, see [`SteeringConfig`]."""
        values = super().to_dict()
        values["steering"].pop("init_from", None)
        return values

    def steering_config(self) -> PostBlockSteeringConfig:
        """The configuration of a steering adapter with the options in `steering`, for the same base model and task."""
        shared = {f.name: getattr(self, f.name) for f in fields(PeftConfig) if f.init and f.name != "peft_type"}
        options: Any = self.steering  # a dictionary after `__post_init__`
        return PostBlockSteeringConfig(**shared, **options)

    def card_fields(self) -> dict[str, Any]:
        steering = {f"steering: {name}": value for name, value in self.steering_config().card_fields().items()}
        return {"LoRA: rank": self.r, "LoRA: alpha": self.lora_alpha, **steering}

    def lora_config(self) -> LoraConfig:
        """The configuration of a LoRA adapter with the options of LoRA, a plain [`~peft.LoraConfig`]."""
        return LoraConfig(
            **{f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        )


def check_lora_fields(config: LoraConfig) -> None:
    """Checks fields that [`~peft.LoraConfig`] does not check before the injection: those that determine ranks and
    scalings, and those that steering has too.

    Raises:
        ValueError: A rank is less than 1, a number is not finite, or `bias` is invalid.
        TypeError: A field has a value of the wrong type.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict):
            raise TypeError(f"{name} must be a dictionary with names of modules as keys, got {pattern!r}.")
    for r in (config.r, *ranks.values()):
        if not is_integer(r):
            raise TypeError(f"LoRA's ranks (r, rank_pattern) must be integers, got {r!r}.")
        if r <= 0:
            raise ValueError(f"LoRA's ranks (r, rank_pattern) must be at least 1, got {r}.")
    for alpha in (config.lora_alpha, *alphas.values()):
        check_number("lora_alpha", alpha)
    check_number("lora_dropout", config.lora_dropout)
    check_choice("bias", config.bias, ("none", "all", "lora_only"))
    shared = ("modules_to_save", "trainable_token_indices", "base_model_name_or_path", "revision")
    PostBlockSteeringConfig(**{name: getattr(config, name) for name in shared})


def steering_dict(config: PostBlockSteeringConfig) -> dict[str, Any]:
    """The options of steering as a dictionary that can be saved as JSON."""
    values = {name: getattr(config, name) for name in STEERING_FIELDS}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
