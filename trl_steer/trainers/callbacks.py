"""Callbacks for any trainer."""

import logging
import math

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, reduce
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..tuners.steering.penalties import adapter_penalty

logger = logging.getLogger(__name__)

# Loss above which training has diverged, relative to the first loss. Single batches can exceed it.
FACTOR, MARGIN = 2.0, 1.0
IN_A_ROW = 2


class TrainingDivergedError(RuntimeError):
    """Training was stopped because the loss, the gradients or the parameters are not finite."""


class DivergenceCallback(TrainerCallback):
    """Warns when training diverges, and stops it when values are not finite.

    Warns once, on the main process, if the logged loss is more than twice the loss of the first step and at least 1.0
    more, in two consecutive logs. Logs before a run was resumed are included.

    Stops training with an error if values are not finite, so that no such adapter is saved. The gradient norm is
    checked in addition to the loss, because transformers does not log NaN losses (`logging_nan_inf_filter`). The
    parameters are checked before they are saved, because there may be no logs.

    Raises:
        TrainingDivergedError: The loss or a parameter is NaN or infinite, or the gradient norm is NaN.
    """

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # The first loss that is logged otherwise is a mean over several steps, in which training may already diverge.
        if state.global_step == 1 and args.logging_strategy != "no":
            control.should_log = True
        if control.should_save:
            _check_parameters(args, state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        _check_parameters(args, state, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        loss, grad_norm = logs.get("loss"), logs.get("grad_norm")
        if (loss is not None and not math.isfinite(loss)) or (grad_norm is not None and math.isnan(grad_norm)):
            raise TrainingDivergedError(
                f"Training diverged at step {state.global_step}: loss {loss}, gradient norm {grad_norm}. Nothing was "
                f"saved from this step. {_advice(args)}"
            )
        losses = [row["loss"] for row in state.log_history if "loss" in row]
        if loss is None or not losses or not state.is_world_process_zero:
            return
        above = [value > max(FACTOR * losses[0], losses[0] + MARGIN) for value in losses]
        runs = [all(above[end - IN_A_ROW : end]) for end in range(IN_A_ROW, len(above) + 1)]
        if runs and runs[-1] and not any(runs[:-1]):
            logger.warning(
                f"Training diverges: the loss at step {state.global_step} is {loss:.3g}, far above the loss of the "
                f"first step, {losses[0]:.3g}. {_advice(args)}"
            )


@torch.no_grad()
def _check_parameters(args, state, model) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
    broken = torch.tensor(float(not all(parameter.isfinite().all() for parameter in local)), device=args.device)
    if reduce(broken, "sum"):  # so that either all processes raise or none
        raise TrainingDivergedError(
            f"Training diverged: after step {state.global_step}, parameters are NaN or infinite. Nothing was saved "
            f"from this step. {_advice(args)}"
        )


def _advice(args) -> str:
    return (
        f"Divide the learning rate of {args.learning_rate:g} by 2 to 5, because low-rank steering diverges just above "
        "its best learning rate. A warm-up (--warmup_steps 0.1) or a smaller --max_grad_norm also helps."
    )


class PenaltyCallback(TrainerCallback):
    """Adds the penalties of adapters to what is trained: LoFiT's L1 in its first phase, JoLA's on its gates.

    Before each optimizer step, the gradient of the penalty is added to the one of the loss, once, whatever the number
    of accumulated batches, and after clipping, which does not see it. Gradients that are still multiplied by the loss
    scale of fp16 are divided by it first. Schedules of weights count optimizer steps, also over a resumed run. The
    penalty depends on the weights alone, so that each process of DDP adds the same. Models without a penalty train as
    they do without this callback.

    Raises:
        ValueError: Training begins under DeepSpeed or FSDP version 1, where gradients are not those of parameters.

    Example:

        ```py
        >>> SFTTrainer(model, train_dataset=dataset, peft_config=JolaConfig(), callbacks=[PenaltyCallback()])
        ```
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if adapter_penalty(model) is None:
            return
        accelerate_state = AcceleratorState()
        plugin = getattr(accelerate_state, "fsdp_plugin", None)
        is_flat = accelerate_state.distributed_type == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) != 2
        if is_flat or accelerate_state.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "The penalty of an adapter cannot be added under DeepSpeed or FSDP version 1, which keep gradients in "
                "pieces of their own. Use DDP, or FSDP with fsdp_version: 2 in the accelerate configuration."
            )

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        penalty = adapter_penalty(model, state.global_step, state.max_steps)
        if penalty is None:
            return
        _unscale(optimizer)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _unscale(optimizer) -> None:
    """Divides gradients by the loss scale, unless the trainer has done so in order to clip them or take their norm."""
    scaler = getattr(optimizer, "scaler", None)
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    try:
        if scaler is not None:
            scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise
