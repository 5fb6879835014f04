"""Registers our tuners with PEFT. Called by `autoload`; calling it again has no effect.

The package of each tuner calls [`register_tuner`] when it is imported. PEFT is imported inside the functions, because
importing it runs `autoload`, which imports this module.
"""

import enum
import importlib
import warnings
from typing import Any

# Types that PEFT already has, about which the user has been warned.
_WARNED: set[str] = set()


def register_peft_types() -> None:
    """Registers every tuner of this package with PEFT."""
    importlib.import_module("trl_steer.tuners")


def register_tuner(*, name: str, config_cls: type, model_cls: Any) -> None:
    """Registers a tuner with PEFT, as [`~peft.utils.peft_types.register_peft_method`] does for PEFT's own tuners.

    If PEFT already has a type with this name, warns and does not register the tuner.

    Args:
        name (`str`): Name of the PEFT type, in lower case.
        config_cls (`type`): The configuration, a subclass of [`~peft.PeftConfig`].
        model_cls (`type`): The tuner, a subclass of [`~peft.tuners.tuners_utils.BaseTuner`].
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    if _extend_peft_type(PeftType, name) and PeftType[name.upper()] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def _extend_peft_type(PeftType: type[enum.Enum], name: str) -> bool:
    """Adds `name` to PEFT's enum of types, unless PEFT already has it. Returns whether the type is ours."""
    key = name.upper()
    if key in PeftType.__members__:
        if getattr(PeftType[key], "_trl_steer", False):
            return True
        if key not in _WARNED:
            _WARNED.add(key)
            warnings.warn(
                f"This version of PEFT has its own method {key}, so that of trl_steer is not registered. Use an older "
                "version of PEFT to load adapters that were trained with trl_steer.",
                stacklevel=3,
            )
        return False
    add_member(PeftType, key)._trl_steer = True
    return True


def add_member(enum_class: type[enum.Enum], name: str) -> Any:
    """Adds the member `name` to an enum of strings, with the same attributes as members in its definition."""
    member: Any = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_ = member._value_ = name
    member._sort_order_ = len(enum_class._member_names_)
    member.__objclass__ = enum_class
    type.__setattr__(enum_class, name, member)  # `setattr` raises an error for enums
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    if hasattr(enum_class, "_hashable_values_"):  # Python 3.12 and later
        enum_class._hashable_values_.append(name)
    return member
