"""The module that sits in a block, and hands the hidden state of a site to the adapters there."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter import SteeringAdapter, strength_in_context
from .config import SteeringConfig
from .merging import MergedTensor, unmerge
from .sites import BlockAnatomy, Site, get_hidden, replace_hidden


class SiteHook:
    """
    Hands the hidden state of one site to the steering layer of its block, and puts what comes back in its place.

    Not a module, because hooks are shared by what copies modules around `__deepcopy__` (`nn.DataParallel`), and must
    not tie a copy to the modules of the original. The layer is looked up at each call.

    Args:
        layer ([`SteeringLayer`]): The layer.
        site ([`Site`]): The site.
    """

    def __init__(self, layer: SteeringLayer, site: Site):
        self.block, self.layer_name, self.site = layer.get_base_layer(), layer.layer_name, site

    def __deepcopy__(self, memo: dict) -> SiteHook:
        """A copy of the block brings a copy of the layer. Where only a module inside the block is copied, as PEFT does
        with one that is trained in full, the copy belongs to the same block."""
        clone = object.__new__(type(self))
        clone.block = memo.get(id(self.block), self.block)
        clone.layer_name, clone.site = self.layer_name, self.site
        return clone

    def register(self) -> None:
        """Registers this with its module, in front of all other hooks: whatever else listens there, transformers'
        capture of hidden states for one, gets the steered state."""
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


class SteeringLayer(nn.Module, BaseTunerLayer):
    """
    All adapters of one tuner in one block. It is a child of the block and acts through forward hooks on the block and
    the modules inside it, so no path of the base model changes.

    Several active adapters at a site all read the same hidden state, and their updates add.

    Args:
        block (`nn.Module`): The block. Kept as the "base layer", outside of the module tree.
        config: Configuration of the text decoder.

    Attributes:
        layer_name (`str`): Name of the layer as a child of the block: part of every key in an adapter file.
        adapter_layer_names (`tuple[str]`): Name of the dictionary of adapters, part of every key too.
    """

    layer_name: ClassVar[str]
    adapter_layer_names: tuple[str, ...] = ("steering_adapter",)
    other_param_names: tuple[str, ...] = ()
    # PEFT's `disable_input_dtype_casting` turns this off for all tuners. Here the hidden state keeps its dtype anyway.
    cast_input_dtype_enabled: bool = True

    def __init__(self, block: nn.Module, config: Any):
        super().__init__()
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        # An object that is no module, or else the block would become a child of its own child.
        self.anatomy = BlockAnatomy(block, config)
        self.merged_adapters: list[str] = []
        self.merged_tensors: list[MergedTensor] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._hooked: set[str] = set()
        self._replicas: list[weakref.ref[SteeringLayer]] = []

    @staticmethod
    def adapter_class(config: Any) -> type[SteeringAdapter]:
        """The class of the adapter that a configuration asks for."""
        raise NotImplementedError

    @property
    def adapters(self) -> Any:
        """The adapters of this block by name, an `nn.ModuleDict`."""
        return self._modules[self.adapter_layer_names[0]]

    def get_base_layer(self) -> nn.Module:
        return self.anatomy.block

    def update_layer(self, adapter_name: str, config: SteeringConfig) -> None:
        """Adds an adapter, and hooks its site.

        Raises:
            ValueError: The block has no such site.
        """
        site = self.anatomy.site(config.site)
        adapter = self.adapter_class(config)(site.width, config)
        adapter.reset_parameters(identity=config.init_weights)
        adapter.train(self.training)
        self.adapters[adapter_name] = adapter
        if site.name not in self._hooked:
            SiteHook(self, site).register()
            self._hooked.add(site.name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._remove_hooks(self._hooked - {adapter.site for adapter in self.adapters.values()})

    def remove(self) -> None:
        """Takes the hooks and the layer itself out of the block."""
        self._remove_hooks(self._hooked)
        delattr(self.get_base_layer(), self.layer_name)

    def _remove_hooks(self, sites: set[str]) -> None:
        """Also those of copies that PEFT trains in full."""
        for module in self.get_base_layer().modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if self._is_ours(hook, sites)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        self._hooked = self._hooked - sites

    def _is_ours(self, hook: Any, sites: set[str]) -> bool:
        owner = getattr(hook, "__self__", None)
        return isinstance(owner, SiteHook) and owner.layer_name == self.layer_name and owner.site.name in sites

    def forward(
        self, hidden: torch.Tensor, adapter_names: Sequence[str] | None = None, site: str | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor`): (batch, sequence, d) or (batch * sequence, d), the hidden state at the site.
            adapter_names (`Sequence[str]`, *optional*):
                The adapter for each row of `hidden`, `"__base__"` for none. By default the active adapters, for all.
            site (`str`, *optional*): Only the adapters at this site.

        Returns:
            `torch.Tensor`: Shape and dtype of `hidden`.
        """
        if self._disable_adapters:
            return hidden
        if adapter_names is not None:
            return self._forward_per_row(hidden, adapter_names, site)
        # Plain dictionaries and few calls: this runs for every block of every token, with caches full of weights.
        adapters = self.adapters._modules
        active, merged, steered = self._active_adapter, self.merged_adapters, None
        for name in (active,) if isinstance(active, str) else active:
            adapter = adapters.get(name)
            if adapter is not None and name not in merged and (site is None or adapter.site == site):
                if merged:
                    self._check_beside_merged(name, adapter)
                steered = adapter(hidden, steered, scaling=self.strength(name, adapter))
        return hidden if steered is None else steered

    def _check_beside_merged(self, name: str, adapter: Any) -> None:
        """Adapters that are active together read the same hidden state. Beside a merged one, only offsets still do."""
        others = [self.adapters[other] for other in self.merged_adapters if other in self.adapters]
        others = [other for other in others if other.site == adapter.site]
        if others and not all(each.is_offset for each in (adapter, *others)):
            raise ValueError(
                f"Adapter {name!r} is active where {', '.join(self.merged_adapters)} is merged, and would read a "
                "hidden state that is steered already. Merge them together with `merge_adapter`, or call "
                "`unmerge_adapter`."
            )

    def _forward_per_row(self, hidden: torch.Tensor, adapter_names: Sequence[str], site: str | None) -> torch.Tensor:
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, call `unmerge_adapter()`.")
        if len(adapter_names) != len(hidden):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(hidden)} respectively."
            )
        steered = hidden.clone()
        for name in sorted(set(adapter_names) & set(self.adapters)):
            adapter = self.adapters[name]
            if site is None or adapter.site == site:
                rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
                steered[rows] = adapter(hidden[rows], scaling=self.strength(name, adapter))
        return steered

    def strength(self, name: str, adapter: Any) -> float:
        """Strength of an adapter in the context that runs."""
        return strength_in_context(adapter) if adapter.contexts else adapter.scaling

    # Merging

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            # The block runs before its hook, too late to take a merged update back out there.
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: the tuner's `merge_adapter` has merged the adapters already, since it takes the whole model to
        tell where that is exact."""

    def unmerge(self) -> None:
        """Puts the tensors that updates were merged into back, bit for bit."""
        unmerge(self)

    # Devices

    def move_to_execution_device(self, adapter_name: str, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Moves an adapter to where its block computes now, keeping its dtype.

        Args:
            adapter_name (`str`): The adapter.
            weights (`dict[str, torch.Tensor]`, *optional*):
                The adapter's weights, if it was offloaded with its block since they were loaded. It is small, and
                accelerate does not know where on disk it is: it stays where its block computes.
        """
        if adapter_name not in self.adapters:
            return
        adapter = self.adapters[adapter_name]
        hook: Any = getattr(adapter, "_hf_hook", None)
        if weights is not None and getattr(hook, "offload", False):
            hook.weights_map = weights  # from which removing the hook restores them
            remove_hook_from_module(adapter)
        device, _ = self._block_device_and_dtype()
        if device is not None and not adapter.is_offloaded():
            adapter.to(device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.adapters:
            return
        adapter = self.adapters[adapter_name]
        if not adapter.is_offloaded():
            block_device, dtype = self._block_device_and_dtype()
            adapter.to(device=device if device is not None else block_device, dtype=dtype)

    def _block_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Where the block computes, and the floating point format of its weights; `None` where it does not say.

        Weights that accelerate has offloaded are on the meta device, and a hook knows where they will be. Quantized
        weights are integers, so it is norms and biases that tell the format then.
        """
        block = self.get_base_layer()
        own = {id(parameter) for parameter in self.parameters()}
        weights = [p for p in block.parameters() if id(p) not in own]
        dtype = next((p.dtype for p in weights if p.dtype.is_floating_point and p.dtype.itemsize > 1), None)
        device = next((p.device for p in weights if not p.is_meta), None)
        for module in block.modules():
            execution_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if execution_device is not None:
                device = torch.device(execution_device)
                break
        return device, dtype

    def _replicate_for_data_parallel(self) -> SteeringLayer:
        replica = super()._replicate_for_data_parallel()
        self._replicas[:] = [known for known in self._replicas if known() is not None]
        self._replicas.append(weakref.ref(replica))
        return replica

    def replica_for(self, hidden: torch.Tensor) -> SteeringLayer:
        """The copy of this layer that `nn.DataParallel` has made last on the device of `hidden`."""
        for known in reversed(self._replicas):
            replica = known()
            if replica is not None and hidden.device in replica.devices():
                return replica
        return self

    def devices(self) -> set[torch.device]:
        """Devices of the adapters' weights, also of a replica's, which are no parameters."""
        tensors = [
            value
            for adapter in self.adapters.values()
            for value in (*vars(adapter).values(), *adapter.parameters())
            if isinstance(value, torch.Tensor)
        ]
        return {tensor.device for tensor in tensors}
