"""Where in a transformer block an adapter can sit, and how a hidden state is read from what a module takes or returns.

This is the only place that knows the names of a block's parts. Structure tells the rest.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

# Parts of the names of a block's children that hold its attention and its MLP.
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe")
# Names of a block's attention and MLP themselves, whatever else has parts of them in its name (DeepSeek V4's `attn_hc`
# and `ffn_hc` mix streams).
_WHOLE_NAMES = (
    *("self_attn", "self_attention", "attn", "attention", "linear_attn"),
    *("mlp", "ffn", "feed_forward", "feedforward"),
)
# What modules call the residual stream that they add by themselves: both of Bloom's, MPT's MLP, BERT's attention.
_RESIDUAL = frozenset({"residual", "input_tensor"})
# A norm of such a name sits between the MLP and the residual addition (Gemma 2 and 3, OLMo 2, GLM 4). Blocks that have
# one have another behind the attention: the first of the second line that there is. In other blocks
# `post_attention_layernorm` is the norm in front of the MLP.
_NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_NORMS_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
# Inkling's and Inkling 2's convolutions between a sublayer and the residual addition.
_CONVOLUTIONS_AFTER_MLP = ("mlp_sconv", "post_mlp_convolution")
_CONVOLUTIONS_AFTER_ATTENTION = ("attn_sconv", "post_attention_convolution")


class Site(NamedTuple):
    """
    One place in one block.

    Attributes:
        name (`str`): One of [`SITES`].
        module (`str`): Name of the module inside the block, `""` for the block itself.
        is_input (`bool`): Whether the hidden state is what the module takes, and not what it returns.
        width (`int`): Size of the hidden state's last dimension.
    """

    name: str
    module: str
    is_input: bool
    width: int


class BlockAnatomy:
    """
    The parts of one transformer block.

    Args:
        block (`nn.Module`): The block, with or without adapters in it.
        config: The configuration of the text decoder, with `hidden_size`.

    Attributes:
        attention (`str`, *optional*): Name of the attention in the block.
        mlp (`str`, *optional*): Name of the MLP, `None` where its layers are children of the block itself (OPT).
        stream (`int`, *optional*):
            Index of the residual stream in the first dimension of the block's output, for blocks that carry several
            (Gemma 3n). `None` where the output is the residual stream.
    """

    def __init__(self, block: nn.Module, config: Any):
        self.block, self.config = block, config
        self.hidden_size: int = config.hidden_size
        self.stream: int | None = getattr(config, "altup_active_idx", None)
        self.attention = self._child(_ATTENTION)
        self.mlp = self._child(_MLP, other_than=self.attention)

    def linear_layers(self) -> dict[str, Any]:
        """Linear layers of the base model by name, in order, whether or not an adapter is wrapped around them."""
        return linear_layers(self.block)

    def residual_writers(self) -> list[str]:
        """Names of the linear layers whose output has the width of the residual stream."""
        return [name for name, linear in self.linear_layers().items() if out_features(linear) == self.hidden_size]

    def attention_output(self) -> str | None:
        """Name of the attention's output projection, not of one that attends to an encoder beside it."""
        inside = [name for name in self.residual_writers() if self.is_in_attention(name)]
        own = [name for name in inside if name.startswith(f"{self.attention}.")]
        return next(reversed(own or inside), None)

    def mlp_output(self) -> str | None:
        """Name of the MLP's last linear layer; where no module is called an MLP, of the last outside the attention."""
        outside = [name for name in self.residual_writers() if not self.is_in_attention(name)]
        inside = [name for name in outside if _is_inside(name, _MLP)]
        return next(reversed(inside or outside), None)

    def norm_after(self, name: str) -> str | None:
        """Name of the norm between the module `name` and the residual addition."""
        after_mlp = self._first_of(_NORMS_AFTER_MLP)
        if after_mlp is None:
            return None
        return self._first_of(_NORMS_AFTER_ATTENTION) if self.is_in_attention(name) else after_mlp

    def is_in_attention(self, name: str) -> bool:
        """Whether the module `name` of the block is its attention, or inside it."""
        return _is_inside(name, _ATTENTION)

    def site(self, name: str) -> Site:
        """The site `name` of this block.

        Raises:
            ValueError: There is no such site in this block.
        """
        if name not in _FINDERS:
            raise ValueError(f"There is no site {name!r}; the sites are {list(SITES)}.")
        site = _FINDERS[name](self)
        if site is None:
            raise ValueError(
                f"{type(self.block).__name__} has no site {name!r}: no part of it could be told to be that. Its "
                f"children are {[child for child, _ in self.block.named_children()]}."
            )
        return site

    def _post_block(self) -> Site:
        return Site("post_block", "", False, self.hidden_size)

    def _pre_mlp(self) -> Site | None:
        module = self.mlp or self._outside_attention(0)
        return None if module is None else Site("pre_mlp", module, True, self.hidden_size)

    def _post_mlp(self) -> Site | None:
        module = self.mlp or self._outside_attention(-1)
        if self.mlp is not None and self._adds_residual(self.mlp):
            module = self.mlp_output()
        return self._output("post_mlp", module)

    def _post_attn(self) -> Site | None:
        module = self.attention
        if module is not None and self._adds_residual(module):
            module = self.attention_output()
        return self._output("post_attn", module)

    def _output(self, site: str, module: str | None) -> Site | None:
        """The last module between a sublayer and the residual addition."""
        if module is None:
            return None
        in_attention = self.is_in_attention(module)
        convolution = self._first_of(_CONVOLUTIONS_AFTER_ATTENTION if in_attention else _CONVOLUTIONS_AFTER_MLP)
        return Site(site, convolution or self.norm_after(module) or module, False, self.hidden_size)

    def _heads(self) -> Site | None:
        module = self.attention_output()
        return None if module is None else Site("heads", module, True, in_features(self.linear_layers()[module]))

    def _outside_attention(self, index: int) -> str | None:
        """The first or the last of the linear layers that are children of the block itself."""
        names = [name for name in self.linear_layers() if "." not in name and not self.is_in_attention(name)]
        return names[index] if len(names) > 1 else None  # a single one is no MLP (Zamba's projection of another block)

    def _child(self, parts: tuple[str, ...], other_than: str | None = None) -> str | None:
        """The child called so that has a matrix; norms and dropouts bear such names too. `None` where there are
        several, of which none is the whole: a list of them, or experts beside an MLP that all tokens go through."""
        children = {
            name: child
            for name, child in self.block.named_children()
            if name != other_than
            and any(part in name.lower() for part in parts)
            and any(parameter.dim() > 1 for parameter in child.parameters())
        }
        if any(isinstance(child, nn.ModuleList) for child in children.values()):
            return None
        whole = next((name for name in children if name in _WHOLE_NAMES), None)
        if whole is not None or len(children) != 1:
            return whole
        ((name, child),) = children.items()
        # DBRX has its attention inside of what also normalizes and adds.
        inner = next((inner for inner, _ in child.named_children() if inner in _WHOLE_NAMES), None)
        return name if inner is None else f"{name}.{inner}"

    def _adds_residual(self, name: str) -> bool:
        """Whether a module, or one inside it, takes the residual stream too, so that it returns a sum."""
        modules = self.block.get_submodule(name).modules()
        return any(_RESIDUAL & set(inspect.signature(type(part).forward).parameters) for part in modules)

    def _first_of(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if hasattr(self.block, name)), None)


_FINDERS: dict[str, Callable[[BlockAnatomy], Site | None]] = {
    "post_block": BlockAnatomy._post_block,
    "pre_mlp": BlockAnatomy._pre_mlp,
    "post_mlp": BlockAnatomy._post_mlp,
    "post_attn": BlockAnatomy._post_attn,
    "heads": BlockAnatomy._heads,
}
SITES = tuple(_FINDERS)


def linear_layers(module: nn.Module) -> dict[str, Any]:
    """The linear layers of the base model in a module by name, in order, whether or not an adapter is wrapped around
    them."""
    found: dict[str, Any] = {}
    inside: list[str] = []
    for name, child in module.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        base = child
        if isinstance(child, BaseTunerLayer):
            inside.append(f"{name}.")
            base = child.get_base_layer()
        if isinstance(base, (nn.Linear, Conv1D)):
            found[name] = base
    return found


def out_features(linear: Any) -> int:
    """Width of the output of a linear layer."""
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features


def in_features(linear: Any) -> int:
    """Width of the input of a linear layer."""
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features


def get_hidden(value: Any, module: nn.Module | None = None) -> torch.Tensor:
    """The hidden state in what a module takes or returns: a tensor itself, the first entry of a tuple or list, or the
    entry `hidden_states`, `last_hidden_state` or else the first of a ModelOutput or dictionary.

    Args:
        value: What the module takes or returns.
        module (`nn.Module`, *optional*): The module, for the error.

    Raises:
        TypeError: `value` is nothing of these, or holds no tensor there.
    """
    hidden = value
    if isinstance(value, (tuple, list)) and value:
        hidden = value[0]
    elif isinstance(value, dict) and value:
        hidden = value[_hidden_key(value)]
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(
            f"{'The module' if module is None else type(module).__name__} returned {type(value).__name__}; the "
            "hidden state to steer must be a tensor, or the first entry of a tuple or list, or in a ModelOutput or "
            "dictionary."
        )
    return hidden


def replace_hidden(value: Any, hidden: torch.Tensor) -> Any:
    """A copy of `value` with another hidden state, of the same type, all other entries the same objects."""
    if isinstance(value, torch.Tensor):
        return hidden
    if isinstance(value, tuple):
        entries = (hidden, *value[1:])
        return type(value)(*entries) if hasattr(value, "_fields") else entries  # namedtuples stay what they are
    if isinstance(value, list):
        return [hidden, *value[1:]]
    replaced = copy.copy(value)
    replaced[_hidden_key(value)] = hidden
    return replaced


def _hidden_key(value: dict) -> Any:
    return next((key for key in ("hidden_states", "last_hidden_state") if key in value), next(iter(value)))


def _is_inside(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in level for level in name.lower().split(".") for part in parts)
