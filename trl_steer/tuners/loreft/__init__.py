"""LoReFT, a baseline: an edit of the hidden state in a learned low-rank subspace."""

from trl_steer.registration import register_tuner

from .config import LoReftConfig
from .layer import LoReftAdapter, LoReftLayer
from .model import LoReftModel

__all__ = ["LoReftAdapter", "LoReftConfig", "LoReftLayer", "LoReftModel"]

register_tuner(name="loreft", config_cls=LoReftConfig, model_cls=LoReftModel)
