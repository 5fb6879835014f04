"""Configuration of joint adaptation: LoRA and post-block steering in one adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import PeftType

from ..post_block_steering.config import PostBlockSteeringConfig
from ..steering.card import DescribesItself
from ..steering.config import check_number, is_integer

# Fields of the steering half that say where and how to steer. The rest (`modules_to_save`, the base model, ...) is of
# the adapter as a whole and stays at the top level.
STEERING_FIELDS = tuple(
    f.name
    for f in fields(PostBlockSteeringConfig)
    if f.name not in {base.name for base in fields(PeftConfig)} | {"modules_to_save", "trainable_token_indices"}
)


@dataclass
class JointSteeringConfig(DescribesItself, LoraConfig):
    """
    Configuration of a [`JointSteeringModel`]: LoRA on the linear layers inside the blocks and post-block steering on
    the blocks, trained together.

    Every option of [`~peft.LoraConfig`] is at the top level and keeps its meaning and its default, but for
    `target_modules`, which is every linear layer inside the blocks. The steering half is a nested plain dictionary.

    [`JointOrthSFTTrainer`] keeps the two in orthogonal output subspaces. What it constrains is the column space of
    LoRA's `B`, which is all that LoRA writes where its update is `B A`, or `B M A` with whatever variants put between
    or change of `A` (`use_rslora`, `use_qalora`, `use_bdlora`, `kasa_config`, `monteclora_config`, `alora_...`). Not
    covered: with `use_dora=True` the rows of `B A` are rescaled afterwards, and the base weight's rows with them, so
    the constraint is about the low-rank direction before that; with `lora_bias=True` LoRA also adds a constant; with
    `bias="all"` or `"lora_only"` biases of the base model are trained.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), sections 4.1 and 5.2.

    Args:
        steering (`dict` or [`PostBlockSteeringConfig`], *optional*):
            The steering half, as a dictionary of [`PostBlockSteeringConfig`]'s fields: `r`, `steering_type`,
            `activation`, `scaling`, `dropout`, `init_weights`, `init_scale`, `target_modules`, `exclude_modules`,
            `layers_to_transform`, `base_model_type`. Fields left out have their defaults.

    Raises:
        ValueError: `steering` has unknown fields, or a value that [`PostBlockSteeringConfig`] refuses; a rank is
            below 1.
        TypeError: `steering` is neither a dictionary nor a [`PostBlockSteeringConfig`]; a field has a wrong type.
    """

    steering: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "The steering half: fields of PostBlockSteeringConfig."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["JOINT_STEERING"]  # ours, see trl_steer.registration
        check_lora_fields(self)
        if isinstance(self.steering, PostBlockSteeringConfig):
            self.steering = steering_dict(self.steering)
        if not isinstance(self.steering, dict):
            raise TypeError(
                "steering must be a dictionary of PostBlockSteeringConfig's fields or such a configuration, got "
                f"{self.steering!r} of type {type(self.steering).__name__}."
            )
        unknown = sorted(set(self.steering) - set(STEERING_FIELDS))
        if unknown:
            raise ValueError(f"steering has unknown fields {unknown}; it can have {sorted(STEERING_FIELDS)}.")
        # Complete and checked, in the plain types that JSON knows.
        self.steering = steering_dict(PostBlockSteeringConfig(**self.steering))

    @classmethod
    def from_parts(cls, lora: LoraConfig, steering: PostBlockSteeringConfig | dict | None = None):
        """
        Joins a LoRA and a steering configuration.

        Args:
            lora ([`~peft.LoraConfig`]): The LoRA half. Its own fields stay at the top level.
            steering ([`PostBlockSteeringConfig`] or `dict`, *optional*): The steering half, defaults if not given.

        Raises:
            ValueError:
                Both halves have `modules_to_save`, `trainable_token_indices`, a task type or a base model, and they
                differ.
            TypeError: `lora` is not a LoRA configuration, or a joint one, which has a steering half of its own.
        """
        if not isinstance(lora, LoraConfig) or isinstance(lora, cls):
            raise TypeError(f"lora must be a LoraConfig, got {type(lora).__name__}.")
        values = {f.name: getattr(lora, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        if isinstance(steering, PostBlockSteeringConfig):
            for name in ("modules_to_save", "trainable_token_indices", "task_type", "base_model_name_or_path"):
                ours, theirs = values.get(name), getattr(steering, name)
                if ours and theirs and ours != theirs:
                    raise ValueError(f"Both halves have {name}, and they differ: {ours} and {theirs}.")
                values[name] = ours or theirs
        return cls(**values, steering=cast(dict, {} if steering is None else steering))

    def steering_config(self) -> PostBlockSteeringConfig:
        """The steering half as a configuration of its own, for the same base model and task."""
        shared = {f.name: getattr(self, f.name) for f in fields(PeftConfig) if f.init and f.name != "peft_type"}
        return PostBlockSteeringConfig(**shared, **self.steering)

    def card_facts(self) -> dict[str, Any]:
        steering = {f"steering: {name}": value for name, value in self.steering_config().card_facts().items()}
        return {"LoRA: rank": self.r, "LoRA: alpha": self.lora_alpha, **steering}

    def lora_config(self) -> LoraConfig:
        """The LoRA half as a configuration of its own, which loads without this package."""
        return LoraConfig(
            **{f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        )


def check_lora_fields(config: LoraConfig) -> None:
    """Makes sure that fields have values that they can have, which [`~peft.LoraConfig`] leaves to the injection: those
    that decide ranks and strengths, and those that steering has too.

    Raises:
        ValueError: A rank is below 1, a number is not finite, or `bias` is unknown.
        TypeError: A field has a value of the wrong type.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict):
            raise TypeError(f"{name} must be a dictionary by names of modules, got {pattern!r}.")
    for r in (config.r, *ranks.values()):
        if not is_integer(r):
            raise TypeError(f"A rank of LoRA (r, rank_pattern) must be an integer, got {r!r}.")
        if r <= 0:
            raise ValueError(f"A rank of LoRA (r, rank_pattern) must be at least 1, got {r}.")
    for alpha in (config.lora_alpha, *alphas.values()):
        check_number("lora_alpha", alpha)
    check_number("lora_dropout", config.lora_dropout)
    if config.bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {config.bias!r}.")
    shared = ("modules_to_save", "trainable_token_indices", "base_model_name_or_path", "revision")
    PostBlockSteeringConfig(**{name: getattr(config, name) for name in shared})


def steering_dict(config: PostBlockSteeringConfig) -> dict[str, Any]:
    """The fields of a steering half in the plain types that JSON knows."""
    values = {name: getattr(config, name) for name in STEERING_FIELDS}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
