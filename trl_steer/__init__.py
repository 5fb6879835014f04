"""Post-block activation steering as an ordinary part of the Hugging Face training stack.

Importing this package is light: public names load on first use. It also makes sure that our PEFT types are registered
as soon as `peft` is there, so that `import trl_steer` is enough for `PeftModel.from_pretrained` to know our folders.
"""

import importlib
from typing import TYPE_CHECKING

from trl_steer import autoload

if TYPE_CHECKING:  # more than there is, but the type of each name
    from trl_steer.trainers import *
    from trl_steer.tuners.joint_steering import *
    from trl_steer.tuners.jola import *
    from trl_steer.tuners.lofit import *
    from trl_steer.tuners.post_block_steering import *
    from trl_steer.tuners.steering import *
    from trl_steer.tuners.sublayer_steering import *

    __version__: str

# Name -> where it lives.
_PUBLIC = {
    "JointOrthSFTConfig": "trl_steer.trainers",
    "JointOrthSFTTrainer": "trl_steer.trainers",
    "JointSteeringConfig": "trl_steer.tuners.joint_steering",
    "JointSteeringModel": "trl_steer.tuners.joint_steering",
    "JolaConfig": "trl_steer.tuners.jola",
    "JolaModel": "trl_steer.tuners.jola",
    "LofitConfig": "trl_steer.tuners.lofit",
    "LofitModel": "trl_steer.tuners.lofit",
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
