"""Activation steering as PEFT methods, to train with TRL.

Importing this package is fast, because public names are loaded on first use. It also registers our PEFT types as soon
as `peft` is imported, so that `PeftModel.from_pretrained` can load our adapters after `import trl_steer`.
"""

import importlib
from typing import TYPE_CHECKING

from trl_steer import autoload

if TYPE_CHECKING:  # more names than are public, but with their types
    from trl_steer.trainers import *
    from trl_steer.tuners.joint_steering import *
    from trl_steer.tuners.jola import *
    from trl_steer.tuners.lofit import *
    from trl_steer.tuners.loreft import *
    from trl_steer.tuners.post_block_steering import *
    from trl_steer.tuners.steering import *
    from trl_steer.tuners.sublayer_steering import *

    __version__: str

# Name -> module.
_PUBLIC = {
    "DivergenceCallback": "trl_steer.trainers",
    "JointOrthSFTConfig": "trl_steer.trainers",
    "JointOrthSFTTrainer": "trl_steer.trainers",
    "JointSteeringConfig": "trl_steer.tuners.joint_steering",
    "JointSteeringModel": "trl_steer.tuners.joint_steering",
    "JolaConfig": "trl_steer.tuners.jola",
    "JolaModel": "trl_steer.tuners.jola",
    "LofitConfig": "trl_steer.tuners.lofit",
    "LofitModel": "trl_steer.tuners.lofit",
    "LoReftConfig": "trl_steer.tuners.loreft",
    "LoReftModel": "trl_steer.tuners.loreft",
    "OrthogonalityConstraint": "trl_steer.tuners.joint_steering",
    "PenaltyCallback": "trl_steer.trainers",
    "PostBlockSteeringConfig": "trl_steer.tuners.post_block_steering",
    "PostBlockSteeringModel": "trl_steer.tuners.post_block_steering",
    "SublayerSteeringConfig": "trl_steer.tuners.sublayer_steering",
    "SublayerSteeringModel": "trl_steer.tuners.sublayer_steering",
    "adapter_scaling": "trl_steer.tuners.steering",
    "hotswap_adapter": "trl_steer.tuners.steering",
    "set_scaling": "trl_steer.tuners.steering",
    "steering_operator": "trl_steer.tuners.steering",
    "top_heads": "trl_steer.tuners.lofit",
}

__all__ = ["__version__", *_PUBLIC]

autoload.install()


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("trl-steer")
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return "0+unknown"
