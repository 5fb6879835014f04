"""Short `SFTTrainer` runs of each kind of adapter, for tests that compare one run with another."""

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer
from trl_cases import make_trainer

from trl_steer import JointSteeringConfig, LoReftConfig, PostBlockSteeringConfig

KINDS = {
    "low_rank": lambda dropout: PostBlockSteeringConfig(task_type="CAUSAL_LM", r=4, dropout=dropout),
    "vector": lambda dropout: PostBlockSteeringConfig(task_type="CAUSAL_LM", steering_type="vector"),
    "loreft": lambda dropout: LoReftConfig(task_type="CAUSAL_LM", r=4, dropout=dropout),
    "joint": lambda dropout: JointSteeringConfig(
        task_type="CAUSAL_LM", r=4, lora_dropout=dropout, steering={"r": 2, "dropout": dropout}
    ),
}


def make_run(kind: str, folder: Path, model=None, dropout: float = 0.0, extra=None, **arguments) -> SFTTrainer:
    torch.manual_seed(0)  # of the adapter's weights; the run itself has the seed of its arguments
    return make_trainer(
        "joint" if kind == "joint" else "sft",
        folder,
        model,
        KINDS[kind](dropout),
        rows(),
        extra,
        **{"bf16": False, "max_steps": 4, **arguments},
    )


def rows() -> Dataset:
    """Conversations of different lengths, so that no two halves of a batch have the same number of tokens."""
    texts = [(f"{i} + {i}?", "one, two, three, four"[: 3 + i % 17]) for i in range(32)]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    return Dataset.from_dict({"messages": messages})


class _KillBefore(TrainerCallback):
    """Kills the process, with no chance to clean up, between the gradients of a step and the step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(kind: str, folder: Path, step: int, arguments: dict) -> None:
    make_run(kind, folder, extra={"callbacks": [_KillBefore(step)]}, **arguments).train()
