"""Adapters with random weights in folders, for tests of what reads folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.config import PeftConfig

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig

LOW_RANK = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=3, init_weights=False, scaling=0.7)
SILU = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=3, init_weights=False, activation="silu")
VECTOR = PostBlockSteeringConfig(task_type="CAUSAL_LM", steering_type="vector", init_weights=False, scaling=-0.5)
JOINT = JointSteeringConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, init_lora_weights=False, steering={"r": 2, "init_weights": False}
)


def steer(model: Any, config: PeftConfig, folder: Path, seed: int = 0) -> Any:
    """The model with a new adapter, which is saved to `folder`. Its update is about as large as the hidden state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        steered = get_peft_model(model, copy.deepcopy(config)).eval()  # which PEFT changes
    for name, parameter in steered.named_parameters():
        if name.endswith(".up"):
            parameter.data.mul_(0.3)
    steered.save_pretrained(str(folder))
    return steered


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary)."""
    return model(input_ids=torch.tensor([ids])).logits[0]
