"""Adds our tuners to PEFT's tables. Called by `autoload`; calling it again does nothing.

PEFT is imported in the functions, not above: importing it runs `autoload`, which needs this module to be complete.
"""

import enum
import importlib
import warnings
from typing import Any

# name of the PEFT type -> (module, configuration class, tuner class)
TUNERS = {
    "post_block_steering": (
        "trl_steer.tuners.post_block_steering",
        "PostBlockSteeringConfig",
        "PostBlockSteeringModel",
    ),
    "joint_steering": (
        "trl_steer.tuners.joint_steering",
        "JointSteeringConfig",
        "JointSteeringModel",
    ),
}
# names that PEFT has taken, of which the user has been told
_LEFT_ALONE: set[str] = set()


def register_peft_types() -> None:
    """Registers every tuner of this package with PEFT.

    A type that PEFT itself already has under our name is left alone, with a warning: PEFT's own then loads.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    for name, (module, config_name, model_name) in TUNERS.items():
        if not _extend_peft_type(PeftType, name):
            continue
        tuner = importlib.import_module(module)
        if PeftType[name.upper()] in PEFT_TYPE_TO_TUNER_MAPPING:
            continue  # importing the tuners registers them
        model_cls = getattr(tuner, model_name)
        register_peft_method(
            name=name, config_cls=getattr(tuner, config_name), model_cls=model_cls, prefix=model_cls.prefix
        )


def _extend_peft_type(PeftType: type[enum.Enum], name: str) -> bool:
    """Makes `name` a real member of PEFT's closed enum. Returns whether the type is ours."""
    key = name.upper()
    if key in PeftType.__members__:
        if getattr(PeftType[key], "_trl_steer", False):
            return True
        if key not in _LEFT_ALONE:
            _LEFT_ALONE.add(key)
            warnings.warn(
                f"PEFT has a method of its own called {key}; trl_steer leaves it in place and does not register its "
                "own. Pin an older PEFT to load adapters that were trained with trl_steer.",
                stacklevel=3,
            )
        return False
    add_member(PeftType, key)._trl_steer = True
    return True


def add_member(enum_class: type[enum.Enum], name: str) -> Any:
    """Adds the string `name` to an enum of strings, as a member like those of its definition."""
    member: Any = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_ = member._value_ = name
    member._sort_order_ = len(enum_class._member_names_)
    member.__objclass__ = enum_class
    type.__setattr__(enum_class, name, member)  # enums refuse the ordinary way
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    if hasattr(enum_class, "_hashable_values_"):  # later versions of Python
        enum_class._hashable_values_.append(name)
    return member
