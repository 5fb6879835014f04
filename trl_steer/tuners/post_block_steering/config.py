"""Configuration of post-block steering."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN

STEERING_TYPES = ("low_rank", "vector")
# Activations that bring trainable parameters of their own, for which an adapter has no place.
_PARAMETRIC_ACTIVATIONS = ("prelu", "xielu")


class RemembersLoading:
    """
    Mixin for configurations.

    Attributes:
        weights_follow (`bool`):
            Whether this was read from an adapter's folder and no adapter was made of it yet. The weights come from
            there too, and none need be drawn.
    """

    weights_follow = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As in [`~peft.PeftConfig`].

        Raises:
            SafetensorError: The folder's weights cannot be read. Said here, so that no model is touched for them.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)  # type: ignore[misc]
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise SafetensorError(f"{weights} cannot be read, it may have been cut off: {error}") from error
        config.weights_follow = True
        return config


@dataclass
class PostBlockSteeringConfig(RemembersLoading, PeftConfig):
    r"""
    Configuration of a [`PostBlockSteeringModel`]: a small learned update to the output of every transformer block.

    With `h` (batch, sequence, d) the output of a block after its last residual addition, the steered output is

    - `"low_rank"`: `h + scaling * act(h @ W_down.T) @ W_up.T`, `W_down` (r, d), `W_up` (d, r);
    - `"vector"`: `h + scaling * v`, `v` (d,).

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.1; the vector form is "1-vec" of its
    Table 2.

    Args:
        r (`int`, defaults to `8`):
            Rank of the low-rank update. Not used by `steering_type="vector"`.
        steering_type (`str`, defaults to `"low_rank"`):
            `"low_rank"` or `"vector"`.
        activation (`str`, *optional*):
            Name of a transformers activation (`"silu"`, `"gelu"`, ...) applied to the r-dimensional bottleneck. `None`
            means the identity. Only for `"low_rank"`.
        scaling (`float`, defaults to `1.0`):
            Strength `s` of the update. Can be turned after loading, see [`set_scaling`].
        dropout (`float`, defaults to `0.0`):
            Dropout probability on the r-dimensional bottleneck, after the activation. Only for `"low_rank"`.
        init_weights (`bool`, defaults to `True`):
            Start as exactly the base model (`W_up`, `v` zero). `False` draws them at random and is meant for tests.
        init_scale (`float`, defaults to `1.0`):
            Factor on the initial `W_down`, which is otherwise drawn like LoRA's `A`. The paper's recipes use 1e-3.
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
            Rows of the embedding matrix to train, as for [`~peft.LoraConfig`].
        base_model_type (`str`, *optional*):
            `model_type` of the base model's text decoder, written down when an adapter is made. An adapter that was
            read from a folder is refused by a model of another type, whose blocks may well have the same names and
            width. `None` in a folder fits every model.

    Raises:
        ValueError: A field has a value that it cannot have; the message says which are allowed.
        TypeError: A field has a value of the wrong type.
    """

    r: int = field(default=8, metadata={"help": "Rank of the low-rank update; not used by steering_type='vector'."})
    steering_type: Literal["low_rank", "vector"] = field(
        default="low_rank",
        metadata={"help": "'low_rank': h + s * act(h @ W_down.T) @ W_up.T; 'vector': h + s * v."},
    )
    activation: str | None = field(
        default=None,
        metadata={"help": "Name of a transformers activation on the bottleneck, None for the identity."},
    )
    scaling: float = field(default=1.0, metadata={"help": "Strength s of the update."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the bottleneck."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start as exactly the base model. False draws all weights at random."}
    )
    init_scale: float = field(default=1.0, metadata={"help": "Factor on the initial W_down."})
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

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["POST_BLOCK_STEERING"]  # ours, see trl_steer.registration
        self._check_update()
        self._check_modules()
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check_layers()

    def _check_update(self) -> None:
        if self.steering_type not in STEERING_TYPES:
            raise ValueError(f"steering_type={self.steering_type!r} is unknown; use one of {STEERING_TYPES}.")
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"r must be an integer, got {self.r!r} of type {type(self.r).__name__}.")
        if self.r <= 0:
            raise ValueError(f"r must be at least 1, got {self.r}.")
        if not isinstance(self.init_weights, bool):
            raise TypeError(f"init_weights must be True or False, got {self.init_weights!r}.")
        for name in ("scaling", "init_scale", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
            if not abs(value) <= sys.float_info.max:
                raise ValueError(f"{name} must be finite, got {value}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}.")
        if self.init_scale <= 0:
            raise ValueError(f"init_scale must be above 0 (with W_down = 0 nothing trains), got {self.init_scale}.")
        known = isinstance(self.activation, str) and self.activation in ACT2FN
        if self.activation is not None and (not known or self.activation in _PARAMETRIC_ACTIVATIONS):
            allowed = sorted(set(ACT2FN) - set(_PARAMETRIC_ACTIVATIONS))
            raise ValueError(
                f"activation={self.activation!r} cannot be used; use None for the identity, or one of {allowed}."
            )
        if self.steering_type == "vector":
            for name, default in (("activation", None), ("dropout", 0.0)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no meaning for steering_type='vector', which has no "
                        f"bottleneck. Leave {name} at {default!r} or use steering_type='low_rank'."
                    )

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value: Any = getattr(self, name)
            if value is None or (isinstance(value, str) and name != "modules_to_save"):
                continue
            if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
                or_expression = "" if name == "modules_to_save" else ", or one regular expression"
                raise TypeError(f"{name} must be a list of names{or_expression}; got {value!r}.")
        tokens = self.trainable_token_indices
        if tokens is not None and not isinstance(tokens, (list, tuple, dict)):
            raise TypeError(
                "trainable_token_indices must be a list of token ids, or a dictionary of such lists by the name of "
                f"the embedding; got {tokens!r}."
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
        indices = layers if isinstance(layers, (list, tuple, set, range)) else [layers]
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"layers_to_transform must hold integers, got {index!r} in {layers!r}.")
            if index < 0:
                raise ValueError(f"layers_to_transform counts blocks from 0, got {index} in {layers!r}.")
        indices = list(indices)
        if not indices:
            raise ValueError("layers_to_transform is empty, so nothing would be steered. Use None for all blocks.")
        if len(set(indices)) != len(indices):
            raise ValueError(f"layers_to_transform names a block twice: {indices}.")
        if not isinstance(layers, int):
            self.layers_to_transform = indices


def _as_set(names):
    """Lists become sets, as in PEFT's own configurations, which its saving and matching expect."""
    return set(names) if isinstance(names, (list, tuple)) else names
