"""Sublayer steering: the update of post-block steering at the sublayers of the blocks (arXiv 2603.00425)."""

from trl_steer.registration import register_tuner

from .config import SublayerSteeringConfig
from .layer import SublayerSteeringLayer
from .model import SublayerSteeringModel

__all__ = ["SublayerSteeringConfig", "SublayerSteeringLayer", "SublayerSteeringModel"]

register_tuner(name="sublayer_steering", config_cls=SublayerSteeringConfig, model_cls=SublayerSteeringModel)
