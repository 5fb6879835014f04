"""What is saved satisfies the constraint, and saving changes nothing of the training."""

import pytest
import torch
from joint_cases import BOUND, joint_trainer, overlap, trained
from peft import PeftModel
from tiny_chat import tiny_model

from trl_steer import JointSteeringConfig


@pytest.mark.parametrize(
    ("steering", "side"), [("low_rank", "output"), ("vector", "output"), ("low_rank", "input")], ids=str
)
def test_a_run_that_saves_ends_with_the_weights_of_one_that_does_not(steering, side, tmp_path):
    ends = []
    for strategy in ("no", "steps"):
        torch.manual_seed(0)
        config = JointSteeringConfig(r=4, steering={"steering_type": steering, "r": 2}, task_type="CAUSAL_LM")
        arguments = {"max_steps": 7, "learning_rate": 1e-2, "orthogonal_every": 10, "orthogonal_side": side}
        trainer = joint_trainer(
            tmp_path / strategy, config, **arguments, save_strategy=strategy, save_steps=3, save_total_limit=None
        )
        trainer.train()
        ends.append(dict(trained(trainer).named_parameters()))
    assert all(torch.equal(parameter, ends[1][name]) for name, parameter in ends[0].items())
    folders = sorted((tmp_path / "steps").glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    for folder in folders:
        assert overlap(PeftModel.from_pretrained(tiny_model(), folder), side=side) <= BOUND
