"""The part of a configuration that all steering tuners share."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from .card import DescribesItself


@dataclass
class SteeringConfig(DescribesItself, PeftConfig):
    r"""
    Base class of the configurations of steering tuners. A tuner adds `site`, as a field or as a class attribute, and
    the fields of its own update.

    Args:
        scaling (`float`, defaults to `1.0`):
            Strength `s` of the update. Can be turned after loading, see [`set_scaling`].
        init_weights (`bool`, defaults to `True`):
            Start as the base model, as nearly as the method allows. `False` draws all weights at random and is meant
            for tests.
        target_modules (`list[str]` or `str`, *optional*):
            Blocks to steer. By default all blocks of the text decoder, found by structure. A list holds names of
            blocks, or of lists of blocks, in full or by their ending (`"layers.3"`, `"model.layers"`); a string is a
            regular expression that the full name of a block must match (`r"model\.layers\.\d+"`).
        exclude_modules (`list[str]` or `str`, *optional*):
            Blocks to leave alone, written as in `target_modules`.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indices, from 0, of the blocks to steer: the number that ends a block's name. Not together with a regular
            expression in `target_modules`, which can say the same.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train in full and to save with the adapter, a classification head for example.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Rows of the embedding matrix to train. A dictionary names the embedding.
        base_model_type (`str`, *optional*):
            `model_type` of the base model's text decoder, written down when an adapter is made. An adapter that is
            loaded from a folder is refused by a model of another type, whose blocks may well have the same names and
            width. `None` in a folder fits every model.

    Raises:
        ValueError: A field has a value that it cannot have; the message says which are allowed.
        TypeError: A field has a value of the wrong type.
    """

    scaling: float = field(default=1.0, metadata={"help": "Strength s of the update."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the base model. False draws all weights at random."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Blocks to steer: names, endings of names, or one regular expression. Default: all blocks."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Blocks to leave alone, written as in target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices, from 0, of the blocks to steer. Default: all."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train in full and to save with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding matrix to train."}
    )
    base_model_type: str | None = field(
        default=None, metadata={"help": "model_type of the base model's text decoder. Written down by the tuner."}
    )

    @property
    def site(self) -> str:
        """Name of the site, see `sites.py`. Tuners replace this by a field or a class attribute."""
        raise NotImplementedError

    def __post_init__(self):
        super().__post_init__()
        check_number("scaling", self.scaling)
        if not isinstance(self.init_weights, bool):
            raise TypeError(f"init_weights must be True or False, got {self.init_weights!r}.")
        for name in ("base_model_type", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}.")
        self._check_names()
        self._check_tokens()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check_layers()

    def card_facts(self) -> dict[str, Any]:
        """See [`DescribesItself`]."""
        layers = self.layers_to_transform
        return {
            "site": self.site,
            "blocks": None
            if layers is None
            else ", ".join(map(str, layers if isinstance(layers, list) else [layers])),
            "scaling": None if self.scaling == 1 else self.scaling,
            "model type": self.base_model_type,
        }

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value: Any = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
                or_expression = "" if name == "modules_to_save" else ", or one regular expression"
                raise TypeError(f"{name} must be a list of names{or_expression}; got {value!r}.")

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
        for indices in lists if tokens is not None else []:
            if not isinstance(indices, (list, tuple)) or not all(
                is_integer(index) and index >= 0 for index in indices
            ):
                raise TypeError(
                    "trainable_token_indices must be a list of token ids, or a dictionary of such lists by the name "
                    f"of the embedding; got {tokens!r}."
                )

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={layers} cannot be used with the regular expression "
                f"target_modules={self.target_modules!r}. Say the layers in the expression, or leave it out."
            )
        indices = list(layers) if isinstance(layers, (list, tuple, set, range)) else [layers]
        for index in indices:
            if not is_integer(index):
                raise TypeError(f"layers_to_transform must hold integers, got {index!r} in {layers!r}.")
            if index < 0:
                raise ValueError(f"layers_to_transform counts blocks from 0, got {index} in {layers!r}.")
        if not indices:
            raise ValueError("layers_to_transform is empty, so nothing would be steered. Use None for all blocks.")
        if len(set(indices)) != len(indices):
            raise ValueError(f"layers_to_transform names a block twice: {indices}.")
        if not isinstance(layers, int):
            self.layers_to_transform = indices


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer and not a truth value, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any) -> None:
    """Makes sure that the field `name` holds a finite number.

    Raises:
        TypeError: `value` is no number.
        ValueError: `value` is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}.")


def _as_set(names):
    """Lists become sets, as in PEFT's own configurations, which its saving and matching expect."""
    return set(names) if isinstance(names, (list, tuple)) else names
