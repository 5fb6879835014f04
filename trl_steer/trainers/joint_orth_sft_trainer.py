"""Supervised fine-tuning of LoRA and steering together, in orthogonal output subspaces."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from ..tuners.joint_steering import JointSteeringConfig, OrthogonalityConstraint
from .joint_orth_sft_config import JointOrthSFTConfig
from .orthogonality import OrthogonalityCallback


class JointOrthSFTTrainer(SFTTrainer):
    """
    Trainer for orthogonality-constrained joint adaptation.

    LoRA on the linear layers and post-block steering on the blocks are trained together. After each optimizer step the
    steering update of each block is projected onto the orthogonal complement of what LoRA writes into the residual
    stream there. Everything else is [`~trl.SFTTrainer`]'s.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.2.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As for [`~trl.SFTTrainer`].
        args ([`JointOrthSFTConfig`], *optional*): Training arguments.
        peft_config ([`JointSteeringConfig`] or [`~peft.LoraConfig`], *optional*):
            The adapter. A plain LoRA configuration is joined with default steering; without any, both halves have
            their defaults.
        kwargs: Everything else that [`~trl.SFTTrainer`] takes.

    Raises:
        ValueError:
            The constraint would be empty, cannot hold, or cannot be enforced under this parallelism. Or rates of the
            halves were given together with a ready-made optimizer.
        TypeError: `peft_config` is of another method.
    """

    _tag_names = ["trl", "joint-orth-sft"]
    _name = "Joint-Orth SFT"

    def __init__(self, model, args: JointOrthSFTConfig | None = None, *, peft_config=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = JointOrthSFTConfig(f"{model_name.split('/')[-1]}-JointOrthSFT")
        if not isinstance(args, JointOrthSFTConfig):
            raise TypeError(f"args must be a JointOrthSFTConfig, got {type(args).__name__}, which lacks its fields.")
        if not isinstance(model, PeftModel):
            peft_config = _joint_config(peft_config)
        if kwargs.get("optimizers", (None, None))[0] is not None:
            _refuse_rates_for_a_finished_optimizer(args)
        super().__init__(model, args, peft_config=peft_config, **kwargs)

        self.projection: OrthogonalityCallback | None = None
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        self._adapter_name = adapter_name = _joint_adapter(unwrapped)
        if args.orthogonal:
            self._check_parallelism()
            constraint = OrthogonalityConstraint(
                unwrapped,
                adapter_name,
                side=args.orthogonal_side,
                modules=args.orthogonal_modules,
                norms=args.orthogonal_norms,
            )
            self.projection = OrthogonalityCallback(
                constraint,
                every=args.orthogonal_every,
                before_step=args.orthogonal_before_step,
                at_end=args.orthogonal_at_end,
                gradients=args.orthogonal_gradients,
            )
            self.add_callback(self.projection)

    def train(self, *args, **kwargs):
        """As in [`~transformers.Trainer`]. The adapter must still be the one that the constraint is about."""
        active = _joint_adapter(self.accelerator.unwrap_model(self.model))
        if active != self._adapter_name:
            raise ValueError(
                f"The trainer was made for adapter {self._adapter_name!r}, but {active!r} is active now. Call "
                f"`model.set_adapter({self._adapter_name!r})`, or make a new trainer."
            )
        return super().train(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in [`~transformers.Trainer`], with the two halves in groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            _split_groups(optimizer, self.model if model is None else model, self.args)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # What is saved satisfies the constraint, whatever `orthogonal_every` is; training goes on as if nothing was.
        projection = self.projection
        with projection.constraint.projected() if projection is not None and projection.at_end else nullcontext():
            super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= self._half_norms()
            if self.projection is not None:
                logs |= self.projection.take_report()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def _half_norms(self) -> dict[str, float]:
        squares = {"lora_norm": 0.0, "steering_norm": 0.0}
        model: Any = self.model
        for name, parameter in model.named_parameters():
            half = "steering_norm" if _is_steering(name) else "lora_norm"
            if parameter.requires_grad and ".lora_" in name:  # which our own leaves begin with too
                norm: Any = parameter.detach().float().norm()
                squares[half] += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
        return {name: value**0.5 for name, value in squares.items()}

    def _check_parallelism(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "orthogonal=True cannot be enforced under DeepSpeed: its optimizer owns partitioned copies of the "
                "weights, which would undo the projection. Use DDP or FSDP2 (integrations/accelerate has "
                "configurations), or set orthogonal=False."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "orthogonal=True needs the weights of the two halves as matrices, which FSDP version 1 flattens. Set "
                "fsdp_version: 2 in the accelerate configuration, or orthogonal=False."
            )
        if self.accelerator.unwrap_model(self.model).peft_config[self._adapter_name].use_bdlora:
            raise ValueError(
                "orthogonal=True with use_bdlora needs the whole of a block-diagonal matrix that FSDP shards. Leave "
                "out use_bdlora, use DDP, or set orthogonal=False."
            )


def _refuse_rates_for_a_finished_optimizer(args: JointOrthSFTConfig) -> None:
    names = ("lora_learning_rate", "steering_learning_rate", "steering_weight_decay")
    given = [name for name in names if getattr(args, name)]
    if given:
        raise ValueError(
            f"{' and '.join(given)} would have no effect on an optimizer that comes ready-made with `optimizers`. "
            "Give its parameter groups these values, or let the trainer make it (`optim`, `optimizer_cls_and_kwargs`)."
        )


def _joint_config(peft_config) -> JointSteeringConfig:
    if peft_config is None:
        return JointSteeringConfig(task_type="CAUSAL_LM")
    if isinstance(peft_config, JointSteeringConfig):
        return peft_config
    if isinstance(peft_config, LoraConfig):
        return JointSteeringConfig.from_parts(peft_config)
    raise TypeError(
        f"JointOrthSFTTrainer needs a JointSteeringConfig, or a LoraConfig to join with default steering, got "
        f"{type(peft_config).__name__}. JointSteeringConfig.from_parts(lora, steering) makes one of two halves."
    )


def _joint_adapter(model: Any) -> str:
    """Name of the one adapter that is going to be trained."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"JointOrthSFTTrainer trains one adapter, but {model.active_adapters} are active. Choose one with "
            "`model.set_adapter(name)`."
        )
    (name,) = model.active_adapters
    if not isinstance(model.peft_config[name], JointSteeringConfig):
        raise TypeError(
            f"Adapter {name!r} of the model is a {type(model.peft_config[name]).__name__}; JointOrthSFTTrainer trains "
            "a JointSteeringConfig."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"Adapter {name!r} is frozen. Load it with `PeftModel.from_pretrained(..., is_trainable=True)`, or call "
            f"`model.set_adapter({name!r})`."
        )
    return name


def _is_steering(parameter_name: str) -> bool:
    return ".post_block_steering." in parameter_name


def _split_groups(optimizer: torch.optim.Optimizer, model: Any, args: Any) -> None:
    """Gives the steering parameters of each group a group of their own, with their learning rate and weight decay."""
    steering = {id(parameter) for name, parameter in model.named_parameters() if _is_steering(name)}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        # The group's own rate is `learning_rate`, or what came with `optimizer_cls_and_kwargs`.
        lora = {"lr": group["lr"] if args.lora_learning_rate is None else args.lora_learning_rate}
        steer = {
            "lr": group["lr"] if args.steering_learning_rate is None else args.steering_learning_rate,
            "weight_decay": args.steering_weight_decay,
        }
        for is_steering, own in ((False, lora), (True, steer)):
            parameters = [p for p in group["params"] if (id(p) in steering) is is_steering]
            if parameters:
                optimizer.add_param_group({**group, **own, "params": parameters})
