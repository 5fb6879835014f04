"""The constraint needs no trainer."""

import pytest
import torch
from joint_cases import BOUND, overlap
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel, get_peft_model
from torch.nn.utils import parametrizations, prune

from trl_steer import JointSteeringConfig
from trl_steer.tuners.joint_steering import OrthogonalityConstraint
from trl_steer.tuners.post_block_steering import LowRankAdapter

STEERING = {"low_rank": {"r": 3}, "vector": {"steering_type": "vector"}}


def joint_model(steering="low_rank", **fields):
    config = JointSteeringConfig(r=4, steering={**STEERING[steering], **fields}, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), config)


@pytest.mark.parametrize(
    ("steering", "side"), [("low_rank", "output"), ("vector", "output"), ("low_rank", "input")], ids=str
)
def test_plain_training_loop_keeps_the_constraint_at_every_step_and_when_saving(steering, side, tmp_path):
    model = joint_model(steering).train()
    constraint = OrthogonalityConstraint(model, "default", side=side)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, reports, losses = tiny_inputs(), [], []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        constraint.project_gradients()
        optimizer.step()
        reports.append(constraint.project())
        losses.append(loss.item())
        assert overlap(model, side=side) <= BOUND
    assert losses[-1] < losses[0]
    assert reports[-1].max_overlap > BOUND  # there was something to do
    model.save_pretrained(tmp_path)
    assert overlap(PeftModel.from_pretrained(tiny_model(), tmp_path), side=side) <= BOUND


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="Expected side to be one of 'output', 'input', got 'sideways'"):
        OrthogonalityConstraint(joint_model(), "default", side="sideways")


@pytest.mark.parametrize(
    "replace",
    [
        lambda adapter: prune.l1_unstructured(adapter, "up", 0.3),
        lambda adapter: parametrizations.weight_norm(adapter, "up"),
    ],
    ids=["pruned", "parametrized"],
)
def test_weights_that_projecting_would_not_reach_are_refused(replace):
    model = joint_model(init_weights=False)
    constraint = OrthogonalityConstraint(model, "default")
    for adapter in [module for module in model.modules() if isinstance(module, LowRankAdapter)]:
        replace(adapter)
    with pytest.raises(ValueError, match=r"layers\.0 is computed by pruning"):
        constraint.project()
