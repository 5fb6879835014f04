"""Trainers, thin subclasses of TRL's, and callbacks for any trainer."""

from .callbacks import DivergenceCallback, PenaltyCallback
from .joint_orth_sft_config import JointOrthSFTConfig
from .joint_orth_sft_trainer import JointOrthSFTTrainer

__all__ = ["DivergenceCallback", "JointOrthSFTConfig", "JointOrthSFTTrainer", "PenaltyCallback"]
