"""Joint adaptation: LoRA and post-block steering, trained together (arXiv 2603.00425)."""

from trl_steer.registration import register_tuner

from .config import JointSteeringConfig
from .constraint import OrthogonalityConstraint
from .folders import join_adapters, split_adapter
from .layer import JointSteeringLayer
from .model import JointSteeringModel
from .pairing import find_pairs
from .projection import project_

__all__ = [
    "JointSteeringConfig",
    "JointSteeringLayer",
    "JointSteeringModel",
    "OrthogonalityConstraint",
    "find_pairs",
    "join_adapters",
    "project_",
    "split_adapter",
]

register_tuner(name="joint_steering", config_cls=JointSteeringConfig, model_cls=JointSteeringModel)
