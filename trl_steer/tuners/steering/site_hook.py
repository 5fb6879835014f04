"""The forward hook of one site of one block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .sites import Site, get_hidden, replace_hidden

if TYPE_CHECKING:
    from .layer import SteeringLayer


class SiteHook:
    """
    Replaces the hidden state of one site of one block by the output of the steering layer.

    `nn.DataParallel` copies modules without `__deepcopy__`, so that a copy shares the hooks of the original. Therefore
    the layer is looked up by name at each call.

    Args:
        layer ([`SteeringLayer`]): The steering layer.
        site ([`Site`]): The site.
    """

    def __init__(self, layer: SteeringLayer, site: Site):
        self.block, self.layer_name, self.site = layer.get_base_layer(), layer.layer_name, site

    def __deepcopy__(self, memo: dict) -> SiteHook:
        """Refers to the copy of the block if the block is copied too. If only a module inside the block is copied, as
        PEFT does for `modules_to_save`, the hook still refers to the original block."""
        clone = object.__new__(type(self))
        clone.block = memo.get(id(self.block), self.block)
        clone.layer_name, clone.site = self.layer_name, self.site
        return clone

    def register(self) -> None:
        """Registers this before all other hooks of the module, so that they get the steered hidden state (for example
        those with which transformers records hidden states)."""
        module = self.block.get_submodule(self.site.module)
        if self.site.is_input:
            module.register_forward_pre_hook(self.on_input, prepend=True, with_kwargs=True)
        else:
            module.register_forward_hook(self.on_output, prepend=True)

    def on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return replace_hidden(output, self._steered(module, get_hidden(output, module)))

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._steered(module, get_hidden(args)), *args[1:]), kwargs
        return args, replace_hidden(kwargs, self._steered(module, get_hidden(kwargs)))

    def _steered(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not self.site.module:
            layer = getattr(module, self.layer_name)
            stream = layer.anatomy.stream
            if stream is not None and hidden.dim() == 4:
                steered = layer(hidden[stream], site=self.site.name)
                return torch.cat([hidden[:stream], steered[None], hidden[stream + 1 :]])
        else:
            layer = getattr(self.block, self.layer_name)
            if getattr(module, "_is_replica", False):
                layer = layer.replica_for(hidden)
        return layer(hidden, site=self.site.name)
