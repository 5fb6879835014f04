"""JoLA: a factor and an offset for the output of attention heads, each behind a learned gate (arXiv 2502.01179)."""

from trl_steer.registration import register_tuner

from .config import JolaConfig
from .layer import JolaAdapter, JolaLayer
from .model import JolaModel

__all__ = ["JolaAdapter", "JolaConfig", "JolaLayer", "JolaModel"]

register_tuner(name="jola", config_cls=JolaConfig, model_cls=JolaModel)
