"""Supervised fine-tuning of LoRA and steering together, with outputs in orthogonal subspaces."""

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

    Trains LoRA on the linear layers and post-block steering on the blocks together. After each optimizer step, the
    steering weight of each block is projected onto the orthogonal complement of LoRA's output:
    `W_up <- (I - Q Q^T) W_up`, with `Q` an orthonormal basis of the column space of LoRA's `B` in the module that
    writes to the residual stream. Everything else is as in [`~trl.SFTTrainer`].

    In addition to TRL's metrics, logs `lora_norm` and `steering_norm`, the norms of the parameters;
    `steering_overlap`, the largest `max |Q^T W_up| / ||W_up||` of a block before projections (0 is orthogonal); and
    `steering_norm_kept`, the smallest ratio of the norms of `W_up` after and before a projection.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.2.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As in [`~trl.SFTTrainer`].
        args ([`JointOrthSFTConfig`], *optional*): Training arguments.
        peft_config ([`JointSteeringConfig`] or [`~peft.LoraConfig`], *optional*):
            The adapter. With a LoRA configuration, steering has its defaults. Default: a default
            [`JointSteeringConfig`].
        kwargs: Other arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError:
            There is nothing to be orthogonal to, or the ranks are too large; the constraint does not support the
            distributed setup; or separate learning rates were given together with an optimizer.
        TypeError: `args` or `peft_config` have another type.
    """

    _tag_names = ["trl", "joint-orth-sft"]
    _name = "Joint-Orth SFT"

    def __init__(self, model, args: JointOrthSFTConfig | None = None, *, peft_config=None, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = JointOrthSFTConfig(f"{model_name.split('/')[-1]}-JointOrthSFT")
        if not isinstance(args, JointOrthSFTConfig):
            raise TypeError(f"args must be a JointOrthSFTConfig, got {type(args).__name__}.")
        if not isinstance(model, PeftModel):
            peft_config = _joint_config(peft_config)
        if kwargs.get("optimizers", (None, None))[0] is not None:
            _check_no_separate_rates(args)
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
        """As in [`~transformers.Trainer`].

        Raises:
            ValueError: Another adapter has been activated since the trainer was created.
        """
        active = _joint_adapter(self.accelerator.unwrap_model(self.model))
        if active != self._adapter_name:
            raise ValueError(
                f"The trainer was created for adapter {self._adapter_name!r}, but the active adapter is {active!r}. "
                f"Call `model.set_adapter({self._adapter_name!r})`, or create a new trainer."
            )
        return super().train(*args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in [`~transformers.Trainer`], with separate parameter groups for LoRA and steering."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            _split_groups(optimizer, self.model if model is None else model, self.args)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Saved weights satisfy the constraint for any `orthogonal_every`. Training continues with the original ones.
        projection = self.projection
        with projection.constraint.projected() if projection is not None and projection.at_end else nullcontext():
            super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= self._parameter_norms()
            if self.projection is not None:
                logs |= self.projection.pop_report()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def _parameter_norms(self) -> dict[str, float]:
        squares = {"lora_norm": 0.0, "steering_norm": 0.0}
        model: Any = self.model
        for name, parameter in model.named_parameters():
            key = "steering_norm" if _is_steering(name) else "lora_norm"
            if parameter.requires_grad and ".lora_" in name:  # includes `lora_steering_adapter`
                norm: Any = parameter.detach().float().norm()
                squares[key] += float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) ** 2
        return {name: value**0.5 for name, value in squares.items()}

    def _check_parallelism(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "orthogonal=True cannot be used with DeepSpeed, whose optimizer keeps its own copies of the weights "
                "and would undo the projection. Use DDP or FSDP2 (see integrations/accelerate for configurations), or "
                "set orthogonal=False."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "orthogonal=True cannot be used with FSDP version 1, which flattens the weights. Set fsdp_version: 2 "
                "in the accelerate configuration, or set orthogonal=False."
            )
        if self.accelerator.unwrap_model(self.model).peft_config[self._adapter_name].use_bdlora:
            raise ValueError(
                "orthogonal=True with use_bdlora=True cannot be used with FSDP, which shards the block-diagonal "
                "matrices. Use DDP, or set one of them to False."
            )


def _check_no_separate_rates(args: JointOrthSFTConfig) -> None:
    names = ("lora_learning_rate", "steering_learning_rate", "steering_weight_decay")
    given = [name for name in names if getattr(args, name)]
    if given:
        raise ValueError(
            f"{' and '.join(given)} would have no effect on the optimizer given by `optimizers`. Set these values in "
            "its parameter groups, or let the trainer create the optimizer (`optim`, `optimizer_cls_and_kwargs`)."
        )


def _joint_config(peft_config) -> JointSteeringConfig:
    if peft_config is None:
        return JointSteeringConfig(task_type="CAUSAL_LM")
    if isinstance(peft_config, JointSteeringConfig):
        return peft_config
    if isinstance(peft_config, LoraConfig):
        return JointSteeringConfig.from_parts(peft_config)
    raise TypeError(
        f"peft_config must be a JointSteeringConfig or a LoraConfig, got {type(peft_config).__name__}. Use "
        "JointSteeringConfig.from_parts(lora, steering) to combine a LoRA and a steering configuration."
    )


def _joint_adapter(model: Any) -> str:
    """Name of the adapter to train, the only active one.

    Raises:
        ValueError: Several adapters are active, or the adapter is frozen.
        TypeError: It is not a joint adapter.
    """
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"JointOrthSFTTrainer trains a single adapter, but {model.active_adapters} are active. Select one with "
            "`model.set_adapter(name)`."
        )
    (name,) = model.active_adapters
    if not isinstance(model.peft_config[name], JointSteeringConfig):
        raise TypeError(
            f"JointOrthSFTTrainer needs an adapter with a JointSteeringConfig, but adapter {name!r} of the model has "
            f"a {type(model.peft_config[name]).__name__}."
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
    """Splits each parameter group into one for LoRA and one for steering, with its learning rate and weight decay."""
    steering = {id(parameter) for name, parameter in model.named_parameters() if _is_steering(name)}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        # The learning rate of the group is `learning_rate`, or that in `optimizer_cls_and_kwargs`.
        lora = {"lr": group["lr"] if args.lora_learning_rate is None else args.lora_learning_rate}
        steer = {
            "lr": group["lr"] if args.steering_learning_rate is None else args.steering_learning_rate,
            "weight_decay": args.steering_weight_decay,
        }
        for is_steering, own in ((False, lora), (True, steer)):
            parameters = [p for p in group["params"] if (id(p) in steering) is is_steering]
            if parameters:
                optimizer.add_param_group({**group, **own, "params": parameters})
