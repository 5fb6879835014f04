"""Joint adaptation: LoRA and post-block steering, trained together (arXiv 2603.00425)."""

from .config import JointSteeringConfig
from .folders import join_adapters, split_adapter
from .model import JointSteeringLayer, JointSteeringModel
from .pairing import find_pairs
from .projection import project_

__all__ = [
    "JointSteeringConfig",
    "JointSteeringLayer",
    "JointSteeringModel",
    "find_pairs",
    "join_adapters",
    "project_",
    "split_adapter",
]
