"""The core of all steering tuners: the sites of a block, the adapters there, and the methods PEFT calls on a tuner."""

from .adapter import AffineUpdate, SteeringAdapter, TrainingProgress
from .config import SteeringConfig
from .folder import AdapterFolder
from .functional import adapter_scaling, hotswap_adapter, set_scaling
from .layer import SteeringLayer
from .model import SteeringModel
from .ops.switch import steering_operator
from .penalties import adapter_penalty
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
    "TrainingProgress",
    "adapter_penalty",
    "adapter_scaling",
    "hotswap_adapter",
    "set_scaling",
    "steering_operator",
]
