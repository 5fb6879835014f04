"""Post-block activation steering as an ordinary part of the Hugging Face training stack.

Importing this package is light: public names load on first use. It also makes sure that our PEFT types are registered
as soon as `peft` is there, so that `import trl_steer` is enough for `PeftModel.from_pretrained` to know our folders.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from trl_steer import autoload

if TYPE_CHECKING:
    from trl_steer.trainers import JointOrthSFTConfig, JointOrthSFTTrainer
    from trl_steer.tuners.joint_steering import JointSteeringConfig, JointSteeringModel
    from trl_steer.tuners.post_block_steering import PostBlockSteeringConfig, PostBlockSteeringModel
    from trl_steer.tuners.steering import adapter_scaling, hotswap_adapter, set_scaling, steering_operator
    from trl_steer.tuners.sublayer_steering import SublayerSteeringConfig, SublayerSteeringModel

__version__ = importlib.metadata.version("trl-steer")

_PUBLIC = {
    "JointOrthSFTConfig": "trl_steer.trainers",
    "JointOrthSFTTrainer": "trl_steer.trainers",
    "JointSteeringConfig": "trl_steer.tuners.joint_steering",
    "JointSteeringModel": "trl_steer.tuners.joint_steering",
    "PostBlockSteeringConfig": "trl_steer.tuners.post_block_steering",
    "PostBlockSteeringModel": "trl_steer.tuners.post_block_steering",
    "SublayerSteeringConfig": "trl_steer.tuners.sublayer_steering",
    "SublayerSteeringModel": "trl_steer.tuners.sublayer_steering",
    "adapter_scaling": "trl_steer.tuners.steering",
    "hotswap_adapter": "trl_steer.tuners.steering",
    "set_scaling": "trl_steer.tuners.steering",
    "steering_operator": "trl_steer.tuners.steering",
}

__all__ = [
    "JointOrthSFTConfig",
    "JointOrthSFTTrainer",
    "JointSteeringConfig",
    "JointSteeringModel",
    "PostBlockSteeringConfig",
    "PostBlockSteeringModel",
    "SublayerSteeringConfig",
    "SublayerSteeringModel",
    "__version__",
    "adapter_scaling",
    "hotswap_adapter",
    "set_scaling",
    "steering_operator",
]

autoload.install()


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
