"""Trainers: thin subclasses of TRL's."""

from .joint_orth_sft_config import JointOrthSFTConfig
from .joint_orth_sft_trainer import JointOrthSFTTrainer

__all__ = ["JointOrthSFTConfig", "JointOrthSFTTrainer"]
