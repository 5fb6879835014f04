"""A run that was killed goes on from its last checkpoint as if nothing had happened, to the last bit."""

import signal

import numpy as np
import pytest
import torch
from processes import run_in_process
from sft_runs import KINDS, make_run, train_until_killed
from trl_cases import logged

# Dropout, so that the state of the random number generators counts.
ARGUMENTS = {"dropout": 0.1, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}


def same(found, expected) -> bool:
    """Equality of nested states, tensors and arrays bit for bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, np.ndarray):
        return np.array_equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_uninterrupted(kind, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert run_in_process(train_until_killed, kind, killed, 3, ARGUMENTS) == -signal.SIGKILL
    assert [folder.name for folder in killed.glob("checkpoint-*")] == ["checkpoint-2"]

    resumed = make_run(kind, killed, **ARGUMENTS)
    resumed.train(resume_from_checkpoint=True)
    uninterrupted = make_run(kind, whole, **ARGUMENTS)
    uninterrupted.train()

    assert logged(resumed, "loss") == logged(uninterrupted, "loss")
    assert same(resumed.model.state_dict(), uninterrupted.model.state_dict())
    name = "checkpoint-4/adapter_model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(folder / "checkpoint-4" / name, weights_only=False) for folder in (killed, whole)]
        assert same(*states), name
    assert not same(
        *(torch.load(whole / f"checkpoint-{step}" / "optimizer.pt", weights_only=False) for step in (2, 4))
    )
