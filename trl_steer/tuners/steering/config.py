"""The configuration fields that all steering tuners share."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from transformers.activations import ACT2FN

from trl_steer.choices import ALL, first_and_last

from .card import ModelCardMixin
from .sites import Site

# Activations with trainable parameters, which an adapter cannot store.
_PARAMETRIC_ACTIVATIONS = ("prelu", "xielu")


@dataclass
class SteeringConfig(ModelCardMixin, PeftConfig):
    r"""
    Base class of the configurations of steering tuners. A subclass adds `site`, as a field or a class attribute, and
    the fields of its update.

    Args:
        scaling (`float`, defaults to `1.0`):
            Factor `s` on the update. Can be changed after loading, see [`set_scaling`].
        init_weights (`bool`, defaults to `True`):
            Initialize the adapter so that the update is zero, or close to zero where the method does not allow that.
            `False` initializes all weights at random and is meant for tests.
        init_from (`str`, *optional*):
            Folder or Hub id of an adapter whose weights a new adapter starts from, see [`initial_weights`]. It must
            have the same type, base model, rank, blocks and scaling. Not saved with the adapter.
        positions (`str`, defaults to `"all"`):
            The tokens to edit:

            - `"all"`: every token;
            - `"last_prompt"`: the last token of the prompt;
            - `"f7+l7"`, for any number: the first 7 and the last 7 tokens of the prompt, or half of it each if it is
              shorter.

            The prompt is what comes before the first label that is not -100, or the input of `generate`; see
            [`prompt_in_call`] for other calls. Packed batches cannot be used. Decoded tokens are not edited.
        target_modules (`list[str]` or `str`, *optional*):
            The blocks to steer. Default: all blocks of the text decoder, which are found by structure. A list holds
            names of blocks or of lists of blocks, or the ends of such names (`"layers.3"`, `"model.layers"`). A string
            is a regular expression that the full name of a block must match (`r"model\.layers\.\d+"`).
        exclude_modules (`list[str]` or `str`, *optional*):
            The blocks not to steer, in the same form as `target_modules`.
        layers_to_transform (`int` or `list[int]`, *optional*):
            Indices of the blocks to steer, counted from 0. Cannot be combined with a regular expression in
            `target_modules`.
        modules_to_save (`list[str]`, *optional*):
            Other modules to train and to save with the adapter, such as a classification head.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Token ids whose embeddings are trained. The keys of a dictionary are names of embeddings.
        base_model_type (`str`, *optional*):
            `model_type` of the base model's text decoder, set when the adapter is created. Loading the adapter into
            a model of another type raises an error, even if the names and shapes match. With `None`, this is not
            checked.

    Raises:
        ValueError: A field has an invalid value.
        TypeError: A field has a value of the wrong type.
    """

    scaling: float = field(default=1.0, metadata={"help": "Factor s on the update."})
    init_weights: bool = field(
        default=True,
        metadata={"help": "Initialize the adapter so that the update is zero. False initializes it at random."},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of an adapter whose weights a new adapter starts from."}
    )
    positions: str = field(
        default=ALL,
        metadata={"help": "Tokens to edit: 'all', 'last_prompt', or the first and last n of the prompt, 'f7+l7'."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Blocks to steer: names, ends of names, or one regular expression. Default: all blocks."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Blocks not to steer, in the same form as target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to steer, counted from 0. Default: all blocks."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and to save with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embeddings are trained."}
    )
    base_model_type: str | None = field(
        default=None, metadata={"help": "model_type of the base model's text decoder, set by the tuner."}
    )

    @property
    def site(self) -> str:
        """Name of the site, one of [`SITES`]. Subclasses replace this by a field or a class attribute."""
        raise NotImplementedError

    def for_block(self, name: str, site: Site) -> SteeringConfig:
        """The configuration of the adapter in one block, where adapters differ between blocks. Default: this one.

        Args:
            name (`str`): Full name of the block.
            site ([`Site`]): The site in this block.

        Raises:
            ValueError: The block cannot have such an adapter.
        """
        return self

    def __post_init__(self):
        super().__post_init__()
        check_number("scaling", self.scaling)
        check_bool("init_weights", self.init_weights)
        first_and_last(self.positions)
        if isinstance(self.init_from, Path):
            self.init_from = str(self.init_from)
        for name in ("init_from", "base_model_type", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}.")
        self._check_names()
        self._check_tokens()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check_block_indices()

    def to_dict(self) -> dict[str, Any]:
        """As in [`~peft.PeftConfig`], for saving. Without `init_from`, since an adapter is saved with its weights."""
        return {name: value for name, value in super().to_dict().items() if name != "init_from"}

    def card_fields(self) -> dict[str, Any]:
        layers = self.layers_to_transform
        return {
            "site": self.site,
            "positions": None if self.positions == ALL else self.positions,
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
                or_expression = "" if name == "modules_to_save" else " or a regular expression"
                raise TypeError(f"{name} must be a list of names{or_expression}, got {value!r}.")

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
        for indices in lists if tokens is not None else []:
            if not isinstance(indices, (list, tuple)) or not all(
                is_integer(index) and index >= 0 for index in indices
            ):
                raise TypeError(
                    "trainable_token_indices must be a list of token ids, or a dictionary from names of embeddings to "
                    f"such lists, got {tokens!r}."
                )

    def _check_block_indices(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            return
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={layers} cannot be used with the regular expression "
                f"target_modules={self.target_modules!r}. Select the blocks with one of them."
            )
        indices = list(layers) if isinstance(layers, (list, tuple, set, range)) else [layers]
        for index in indices:
            if not is_integer(index):
                raise TypeError(f"layers_to_transform must contain integers only, got {index!r} in {layers!r}.")
            if index < 0:
                raise ValueError(f"layers_to_transform counts blocks from 0, got {index} in {layers!r}.")
        if not indices:
            raise ValueError("layers_to_transform is empty, so no block would be steered. Use None for all blocks.")
        if len(set(indices)) != len(indices):
            raise ValueError(f"layers_to_transform contains the same block twice: {indices}.")
        if not isinstance(layers, int):
            self.layers_to_transform = indices


def is_integer(value: Any) -> bool:
    """Whether `value` is an `int` but not a `bool`."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any) -> None:
    """Checks that the value of the field `name` is a finite number.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}.")


def check_bool(name: str, value: Any) -> None:
    """Checks that the value of the field `name` is `True` or `False`.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"Expected {name} to be True or False, got {value!r}.")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Checks that the value of the field `name` is one of those that are allowed.

    Raises:
        ValueError: It is not.
    """
    allowed = tuple(allowed)  # not a dictionary, in which one cannot look for a list
    if value not in allowed:
        raise ValueError(f"Expected {name} to be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_rank(r: Any, name: str = "r") -> None:
    """Checks that a rank in the field `name` is a positive integer.

    Raises:
        TypeError: `r` is not an integer.
        ValueError: `r` is less than 1.
    """
    if not is_integer(r):
        raise TypeError(f"{name} must be an integer, got {r!r} of type {type(r).__name__}.")
    if r <= 0:
        raise ValueError(f"{name} must be at least 1, got {r}.")


def check_dropout(dropout: Any) -> None:
    """Checks that the field `dropout` is a probability.

    Raises:
        TypeError: `dropout` is not a number.
        ValueError: `dropout` is less than 0, or 1 or more.
    """
    check_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}.")


def check_activation(activation: Any) -> None:
    """Checks that the field `activation` is `None` or names an activation of transformers without parameters.

    Raises:
        ValueError: It is something else.
    """
    known = isinstance(activation, str) and activation in ACT2FN
    if activation is not None and (not known or activation in _PARAMETRIC_ACTIVATIONS):
        allowed = sorted(set(ACT2FN) - set(_PARAMETRIC_ACTIVATIONS))
        raise ValueError(
            f"Expected activation to be None for the identity, or one of {', '.join(map(repr, allowed))}, got "
            f"{activation!r}."
        )


def _as_set(names):
    """Converts lists to sets, as PEFT's configurations do. PEFT expects sets when it saves and matches."""
    return set(names) if isinstance(names, (list, tuple)) else names
