"""Callbacks for any trainer."""

import logging
import math

import torch
from accelerate.utils import reduce
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

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
