"""Adds our tuners to PEFT's tables. Called by `autoload`; calling it again does nothing.

Every folder under `trl_steer/tuners` that is a tuner calls [`register_tuner`] when it is imported. PEFT is imported in
the functions, not above: importing it runs `autoload`, which needs this module to be complete.
"""

import enum
import importlib
import warnings
from typing import Any

# Names of types that PEFT has taken, of which the user has been told.
_LEFT_ALONE: set[str] = set()


def register_peft_types() -> None:
    """Registers every tuner of this package with PEFT."""
    importlib.import_module("trl_steer.tuners")


def register_tuner(*, name: str, config_cls: type, model_cls: Any) -> None:
    """Registers a tuner with PEFT, as [`~peft.utils.peft_types.register_peft_method`] does for those of PEFT.

    A type that PEFT itself already has under the name is left alone, with a warning: PEFT's own then loads.

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
