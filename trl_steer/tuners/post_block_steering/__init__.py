"""Post-block steering: a learned update to the output of every transformer block (arXiv 2603.00425)."""

from trl_steer.registration import register_tuner

from .config import AdditiveSteeringConfig, PostBlockSteeringConfig
from .layer import LowRankAdapter, PostBlockSteeringLayer, VectorAdapter
from .model import PostBlockSteeringModel

__all__ = [
    "AdditiveSteeringConfig",
    "LowRankAdapter",
    "PostBlockSteeringConfig",
    "PostBlockSteeringLayer",
    "PostBlockSteeringModel",
    "VectorAdapter",
]

register_tuner(name="post_block_steering", config_cls=PostBlockSteeringConfig, model_cls=PostBlockSteeringModel)
