"""Post-block steering: a small learned update to the residual stream after every block (arXiv 2603.00425)."""

from .config import PostBlockSteeringConfig
from .functional import adapter_scaling, hotswap_adapter, set_scaling
from .layer import LowRankAdapter, PostBlockSteeringLayer, VectorAdapter
from .model import PostBlockSteeringModel
from .operator import steering_operator

__all__ = [
    "LowRankAdapter",
    "PostBlockSteeringConfig",
    "PostBlockSteeringLayer",
    "PostBlockSteeringModel",
    "VectorAdapter",
    "adapter_scaling",
    "hotswap_adapter",
    "set_scaling",
    "steering_operator",
]
