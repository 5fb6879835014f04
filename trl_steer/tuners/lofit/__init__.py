"""LoFiT: an offset for the output of attention heads (arXiv 2406.01563)."""

from trl_steer.registration import register_tuner

from .config import HeadLayout, HeadSteeringConfig, LofitConfig
from .layer import HeadAdapter, LofitLayer, LofitOffsetAdapter, LofitScaleAdapter
from .model import LofitModel
from .selection import top_heads

__all__ = [
    "HeadAdapter",
    "HeadLayout",
    "HeadSteeringConfig",
    "LofitConfig",
    "LofitLayer",
    "LofitModel",
    "LofitOffsetAdapter",
    "LofitScaleAdapter",
    "top_heads",
]

register_tuner(name="lofit", config_cls=LofitConfig, model_cls=LofitModel)
