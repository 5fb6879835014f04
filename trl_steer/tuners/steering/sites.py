"""The sites of a transformer block, and access to the hidden state in the inputs and outputs of its modules.

Names of a block's modules are used in this module only. Everything else is found by structure.
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

# Parts of the names of a block's attention and MLP.
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "moe")
# Full names of a block's attention and MLP, which take precedence over other children with such parts in their names
# (DeepSeek V4's `attn_hc` and `ffn_hc`).
_EXACT_NAMES = (
    *("self_attn", "self_attention", "attn", "attention", "linear_attn"),
    *("mlp", "ffn", "feed_forward", "feedforward"),
)
# Names of the argument with which a sublayer takes the residual stream, to add it itself (Bloom, MPT's MLP, BERT's
# attention).
_RESIDUAL = frozenset({"residual", "input_tensor"})
# Norms between the MLP and the residual addition (Gemma 2 and 3, OLMo 2, GLM 4). Blocks with such a norm also have one
# between the attention and the residual addition. In other blocks, `post_attention_layernorm` is the norm before the
# MLP.
_NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_NORMS_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
# Convolutions between a sublayer and the residual addition (Inkling, Inkling 2).
_CONVOLUTIONS_AFTER_MLP = ("mlp_sconv", "post_mlp_convolution")
_CONVOLUTIONS_AFTER_ATTENTION = ("attn_sconv", "post_attention_convolution")
# Name of the activation of an MLP whose layers are children of the block.
_ACTIVATION = "activation_fn"
# Attributes with the size of one attention head. In latent and linear attention, values have a size of their own.
_HEAD_DIMS = ("v_head_dim", "head_v_dim", "head_dim", "head_size", "attention_head_size")


class Site(NamedTuple):
    """
    A place in a block where a hidden state is steered.

    Attributes:
        name (`str`): One of [`SITES`].
        module (`str`): Name of the module inside the block, `""` for the block itself.
        is_input (`bool`): Whether the hidden state is the module's input, rather than its output.
        width (`int`): Size of the hidden state's last dimension.
        head_dim (`int`, *optional*): For `"heads"`, the part of `width` that one attention head fills, if known.
    """

    name: str
    module: str
    is_input: bool
    width: int
    head_dim: int | None = None


class BlockAnatomy:
    """
    The parts of a transformer block.

    Args:
        block (`nn.Module`): The block, with or without adapters.
        config: The configuration of the text decoder, with `hidden_size`.

    Attributes:
        attention (`str`, *optional*): Name of the attention in the block.
        mlp (`str`, *optional*): Name of the MLP, `None` if its layers are children of the block itself (OPT).
        stream (`int`, *optional*):
            Index of the residual stream in the first dimension of the block's output, for blocks with several streams
            (Gemma 3n). `None` if the output is the residual stream.
    """

    def __init__(self, block: nn.Module, config: Any):
        self.block, self.config = block, config
        self.hidden_size: int = config.hidden_size
        self.stream: int | None = getattr(config, "altup_active_idx", None)
        self.attention = self._find_child(_ATTENTION)
        self.mlp = self._find_child(_MLP, other_than=self.attention)

    def linear_layers(self) -> dict[str, Any]:
        """The linear layers of the base model in this block by name, with or without adapters, in order."""
        return linear_layers(self.block)

    def residual_linear_layers(self) -> list[str]:
        """Names of the linear layers whose output has the width of the residual stream."""
        return [name for name, linear in self.linear_layers().items() if out_features(linear) == self.hidden_size]

    def attention_output(self) -> str | None:
        """Name of the output projection of the self-attention (not of a cross-attention)."""
        inside = [name for name in self.residual_linear_layers() if self.is_in_attention(name)]
        own = [name for name in inside if name.startswith(f"{self.attention}.")]
        return next(reversed(own or inside), None)

    def mlp_output(self) -> str | None:
        """Name of the MLP's last linear layer, or of the last one outside the attention if no module is an MLP."""
        outside = [name for name in self.residual_linear_layers() if not self.is_in_attention(name)]
        inside = [name for name in outside if _is_inside(name, _MLP)]
        return next(reversed(inside or outside), None)

    def mlp_module(self) -> nn.Module:
        """The MLP as one module. If its layers are children of the block itself (OPT), a new one made of them.

        Raises:
            ValueError: The block has no MLP.
        """
        if self.mlp is not None:
            return self.block.get_submodule(self.mlp)
        first, last = self.site("pre_mlp").module, self.mlp_output()
        activation = getattr(self.block, _ACTIVATION, None)
        if not isinstance(activation, nn.Module) or last is None:
            raise ValueError(f"Could not find the activation of the MLP in {type(self.block).__name__}.")
        return nn.Sequential(self.block.get_submodule(first), activation, self.block.get_submodule(last))

    def norm_after(self, name: str) -> str | None:
        """Name of the norm between the module `name` and the residual addition, if there is one."""
        after_mlp = self._first_existing(_NORMS_AFTER_MLP)
        if after_mlp is None:
            return None
        return self._first_existing(_NORMS_AFTER_ATTENTION) if self.is_in_attention(name) else after_mlp

    def is_in_attention(self, name: str) -> bool:
        """Whether the module `name` of the block is its attention or inside it."""
        return _is_inside(name, _ATTENTION)

    def site(self, name: str) -> Site:
        """The site `name` of this block.

        Raises:
            ValueError: There is no such site, or this block does not have it.
        """
        if name not in _FINDERS:
            raise ValueError(f"There is no site {name!r}; use one of {list(SITES)}.")
        site = _FINDERS[name](self)
        if site is None:
            raise ValueError(
                f"Could not find the site {name!r} in {type(self.block).__name__}, whose children are "
                f"{[child for child, _ in self.block.named_children()]}. Use another site."
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
        """A site at the output of the last module between a sublayer and the residual addition."""
        if module is None:
            return None
        in_attention = self.is_in_attention(module)
        convolution = self._first_existing(_CONVOLUTIONS_AFTER_ATTENTION if in_attention else _CONVOLUTIONS_AFTER_MLP)
        return Site(site, convolution or self.norm_after(module) or module, False, self.hidden_size)

    def _heads(self) -> Site | None:
        module = self.attention_output()
        if module is None:
            return None
        return Site("heads", module, True, in_features(self.linear_layers()[module]), self._head_dim())

    def _head_dim(self) -> int | None:
        """Size of what one head gives to the output projection. The attention knows it even where it differs between
        blocks, and `hidden_size / num_attention_heads` is not it where the configuration has `head_dim`."""
        inside = list(self.block.get_submodule(self.attention).modules()) if self.attention else []
        for owner in (*inside, self.config):
            sizes = [getattr(owner, name, None) for name in _HEAD_DIMS]
            found = next((size for size in sizes if isinstance(size, int)), None)
            if found is not None:
                return found
        heads = getattr(self.config, "num_attention_heads", None)
        return self.hidden_size // heads if isinstance(heads, int) and heads > 0 else None

    def _outside_attention(self, index: int) -> str | None:
        """The first or last of the block's own linear layers outside the attention."""
        names = [name for name in self.linear_layers() if "." not in name and not self.is_in_attention(name)]
        return names[index] if len(names) > 1 else None  # a single one is not an MLP (Zamba projects another block)

    def _find_child(self, parts: tuple[str, ...], other_than: str | None = None) -> str | None:
        """The child with such a name and with a matrix, which excludes norms and dropouts. `None` if several children
        share the role: those in a module list, or experts next to an MLP for all tokens."""
        children = {
            name: child
            for name, child in self.block.named_children()
            if name != other_than
            and any(part in name.lower() for part in parts)
            and any(parameter.dim() > 1 for parameter in child.parameters())
        }
        if any(isinstance(child, nn.ModuleList) for child in children.values()):
            return None
        exact = next((name for name in children if name in _EXACT_NAMES), None)
        if exact is not None or len(children) != 1:
            return exact
        ((name, child),) = children.items()
        # DBRX's attention is inside a module that also normalizes and adds the residual.
        inner = next((inner for inner, _ in child.named_children() if inner in _EXACT_NAMES), None)
        return name if inner is None else f"{name}.{inner}"

    def _adds_residual(self, name: str) -> bool:
        """Whether a module, or one inside it, takes the residual stream and adds it."""
        modules = self.block.get_submodule(name).modules()
        return any(_RESIDUAL & set(inspect.signature(type(part).forward).parameters) for part in modules)

    def _first_existing(self, names: tuple[str, ...]) -> str | None:
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
    """The linear layers of the base model in a module by name, with or without adapters, in order."""
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
    """The hidden state in the input or output of a module: the tensor itself, the first entry of a tuple or list, or
    the entry `hidden_states`, `last_hidden_state` or else the first one of a ModelOutput or dictionary.

    Args:
        value: Input or output of the module.
        module (`nn.Module`, *optional*): The module, for the error message.

    Raises:
        TypeError: `value` has another type, or this entry is not a tensor.
    """
    hidden = value
    if isinstance(value, (tuple, list)) and value:
        hidden = value[0]
    elif isinstance(value, dict) and value:
        hidden = value[_hidden_key(value)]
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(
            f"{'A module' if module is None else type(module).__name__} takes or returns {type(value).__name__}, "
            "where a hidden state was expected: a tensor, or a tuple, list, ModelOutput or dictionary with one. Use "
            "another site, or exclude the block."
        )
    return hidden


def replace_hidden(value: Any, hidden: torch.Tensor) -> Any:
    """A copy of `value`, of the same type, with another hidden state. All other entries are the same objects."""
    if isinstance(value, torch.Tensor):
        return hidden
    if isinstance(value, tuple):
        entries = (hidden, *value[1:])
        return type(value)(*entries) if hasattr(value, "_fields") else entries  # a namedtuple keeps its type
    if isinstance(value, list):
        return [hidden, *value[1:]]
    replaced = copy.copy(value)
    replaced[_hidden_key(value)] = hidden
    return replaced


def _hidden_key(value: dict) -> Any:
    return next((key for key in ("hidden_states", "last_hidden_state") if key in value), next(iter(value)))


def _is_inside(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in level for level in name.lower().split(".") for part in parts)
