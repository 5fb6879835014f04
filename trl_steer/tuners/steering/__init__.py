"""The core of every steering tuner: where adapters sit in a block, and all that PEFT asks of a tuner."""

from .adapter import AffineUpdate, SteeringAdapter
from .config import SteeringConfig
from .folder import AdapterFolder
from .functional import adapter_scaling, hotswap_adapter, set_scaling
from .layer import SteeringLayer
from .model import SteeringModel
from .ops.low_rank import steering_operator
from .sites import SITES, BlockAnatomy, Site
from .tuner import SteeringTuner

__all__ = [
    "SITES",
    "AdapterFolder",
    "AffineUpdate",
    "BlockAnatomy",
    "Site",
    "SteeringAdapter",
    "SteeringConfig",
    "SteeringLayer",
    "SteeringModel",
    "SteeringTuner",
    "adapter_scaling",
    "hotswap_adapter",
    "set_scaling",
    "steering_operator",
]
