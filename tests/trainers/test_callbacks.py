"""A run that diverges is noticed from what the trainer logs, and noise is not."""

import pytest
from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from trl_steer.trainers.callbacks import DivergenceCallback, TrainingDivergedError


def watch(losses, caplog, resumed=(), process=0, **more):
    callback = DivergenceCallback()
    arguments = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, learning_rate=3e-3)
    history = [{"loss": loss, "step": step} for step, loss in enumerate([*resumed, *losses])]
    for step, loss in enumerate(losses, len(resumed)):
        state = TrainerState(global_step=step, log_history=history[: step + 1], is_world_process_zero=process == 0)
        callback.on_log(arguments, state, TrainerControl(), logs={"loss": loss, **more})
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "losses", [[2.0, 1.5, 1.0], [0.3, 0.9, 0.4], [2.0, 3.9], [0.1, 0.2, 1.0], [2.0, 9.0, 1.0, 9.0, 2.0]]
)
def test_noisy_losses_do_not_count_as_divergence(losses, caplog):
    assert watch(losses, caplog) == []


@pytest.mark.parametrize("losses", [[2.0, 1.0, 4.1, 9.0, 9.0], [0.3, 0.1, 1.4, 1.5]])
def test_loss_far_above_its_start_is_warned_about_once(losses, caplog):
    (said,) = watch(losses, caplog)
    assert "the loss of the first step" in said
    assert "Divide the learning rate of 0.003" in said


def test_one_warning_is_enough_for_all_processes_and_also_after_a_run_was_resumed(caplog):
    assert watch([9.0, 9.0], caplog, resumed=[2.0, 9.0, 9.0]) == []
    assert watch([2.0, 9.0, 9.0], caplog, process=1) == []
    assert "the loss of the first step, 2" in watch([9.0, 9.0], caplog, resumed=[2.0])[0]


@pytest.mark.parametrize("logs", [{"loss": float("nan")}, {"loss": float("inf")}])
def test_nan_or_infinite_loss_stops_the_run(logs, caplog):
    with pytest.raises(TrainingDivergedError, match="at step 1"):
        watch([1.0, logs["loss"]], caplog)


def test_a_nan_gradient_behind_a_filtered_loss_stops_the_run(caplog):
    with pytest.raises(TrainingDivergedError, match="gradient norm nan"):
        watch([1.0], caplog, grad_norm=float("nan"))
