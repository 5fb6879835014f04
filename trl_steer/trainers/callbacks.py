"""Callbacks for any trainer: one that notices a run that diverges, which steering does just above its best rate."""

import logging
import math

import torch
from accelerate.utils import reduce
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# Such a loss is worse than not having trained. One batch can have it by itself, a few in a row have not.
FACTOR, MARGIN = 2.0, 1.0
IN_A_ROW = 2


class TrainingDivergedError(RuntimeError):
    """Training was stopped because the adapter is no longer made of finite numbers."""


class DivergenceCallback(TrainerCallback):
    """Warns once when the loss stays far above where it started, and stops the run when it is no number any more.

    The loss that counts is the one the trainer logs. "Far above" is more than twice the loss of the first step, which
    is logged for this, and at least 1.0 more, in two logs in a row. What was logged before a run was resumed counts,
    and of several processes one warns. transformers replaces a NaN loss by an average before it logs it
    (`logging_nan_inf_filter`), so the gradient norm is watched too; and before anything is saved, the trained
    parameters, since logs may be few or none.

    Raises:
        TrainingDivergedError: on a NaN or infinite loss, a NaN gradient norm, or a parameter that is not finite, so
            that no such adapter is saved as if it were a result.
    """

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # A mean over more steps may hold the explosion already.
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
                f"The loss at step {state.global_step} is {loss:.3g}, far above the {losses[0]:.3g} it started "
                f"from: this run diverges. {_advice(args)}"
            )


@torch.no_grad()
def _check_parameters(args, state, model) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]
    broken = torch.tensor(float(not all(parameter.isfinite().all() for parameter in local)), device=args.device)
    if reduce(broken, "sum"):  # on all processes, so that none waits for one that has stopped
        raise TrainingDivergedError(
            f"Training diverged: after step {state.global_step} trained parameters are NaN or infinite. Nothing was "
            f"saved from this step. {_advice(args)}"
        )


def _advice(args) -> str:
    return (
        f"Lower the learning rate, which is {args.learning_rate:g}, by a factor of 2 to 5: low-rank steering breaks "
        "down just above its best rate. A warm-up (--warmup_steps 0.1) or a smaller --max_grad_norm also helps."
    )
