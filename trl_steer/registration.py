"""Adds our tuners to PEFT's tables. Called by `autoload`; calling it again does nothing."""

import importlib
import warnings
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

# name of the PEFT type -> (module, configuration class, tuner class)
TUNERS = {
    "post_block_steering": (
        "trl_steer.tuners.post_block_steering",
        "PostBlockSteeringConfig",
        "PostBlockSteeringModel",
    ),
}


def register_peft_types() -> None:
    """Registers every tuner of this package with PEFT.

    A type that PEFT itself already has under our name is left alone, with a warning: PEFT's own then loads.
    """
    for name, (module, config_name, model_name) in TUNERS.items():
        if not _extend_peft_type(name):
            continue
        tuner = importlib.import_module(module)
        if PeftType[name.upper()] in PEFT_TYPE_TO_TUNER_MAPPING:
            continue  # importing the tuners registers them
        model_cls = getattr(tuner, model_name)
        register_peft_method(
            name=name, config_cls=getattr(tuner, config_name), model_cls=model_cls, prefix=model_cls.prefix
        )


def _extend_peft_type(name: str) -> bool:
    """Makes `name` a real member of PEFT's closed enum. Returns whether the type is ours."""
    key = name.upper()
    if key in PeftType.__members__:
        if not getattr(PeftType[key], "_trl_steer", False):
            warnings.warn(
                f"PEFT has a method of its own called {key}; trl_steer leaves it in place and does not register its "
                "own. Pin an older PEFT to load adapters that were trained with trl_steer.",
                stacklevel=3,
            )
            return False
        return True
    member: Any = str.__new__(PeftType, key)
    member._name_ = member._value_ = key
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    member._trl_steer = True
    type.__setattr__(PeftType, key, member)
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = member
    PeftType._value2member_map_[key] = member
    return True
