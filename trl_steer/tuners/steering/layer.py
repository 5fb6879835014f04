"""The module in a block that holds its adapters and applies them through forward hooks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trl_steer.choices import ALL

from .adapter import SteeringAdapter, current_scaling
from .adapter_dict import AdapterDict, current_only_adapter
from .config import SteeringConfig
from .matching import modules_outside_adapters
from .merging import MergedTensor, unmerge
from .mixed_batch import AdapterGroup, BatchRows
from .positions import edit_tokens
from .prompts import Prompt, current_prompt
from .site_hook import SiteHook
from .sites import BlockAnatomy


class SteeringLayer(nn.Module, BaseTunerLayer):
    """
    All adapters of one tuner in one block. It is a child of the block and acts through forward hooks, so that the
    names of the base model's modules do not change.

    If several adapters are active at a site, all of them get the same hidden state, and their updates are added.

    Args:
        block (`nn.Module`): The block, which is the "base layer". It is not registered as a child of this layer.
        config: The configuration of the text decoder.

    Attributes:
        layer_name (`str`): Name of this layer in the block. Part of the keys in an adapter file.
        adapter_layer_names (`tuple[str]`): Name of the `nn.ModuleDict` of adapters. Also part of the keys.
    """

    layer_name: ClassVar[str]
    adapter_layer_names: tuple[str, ...] = ("steering_adapter",)
    other_param_names: tuple[str, ...] = ()
    # Read by PEFT's `disable_input_dtype_casting`. Steering layers never cast the hidden state.
    cast_input_dtype_enabled: bool = True

    def __init__(self, block: nn.Module, config: Any):
        super().__init__()
        self.add_module(self.adapter_layer_names[0], AdapterDict())
        # Not a module, since the block would otherwise become a child of its own child.
        self.anatomy = BlockAnatomy(block, config)
        self.merged_adapters: list[str] = []
        self.merged_tensors: list[MergedTensor] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._hooked: set[str] = set()
        self._prompt: Prompt | None = None
        self._replicas: list[weakref.ref[SteeringLayer]] = []

    @staticmethod
    def adapter_class(config: Any) -> type[SteeringAdapter]:
        """The class of the adapter for a configuration."""
        raise NotImplementedError

    @property
    def adapters(self) -> Any:
        """The adapters of this block by name, an [`AdapterDict`]."""
        return self._modules[self.adapter_layer_names[0]]

    def get_base_layer(self) -> nn.Module:
        return self.anatomy.block

    def update_layer(self, adapter_name: str, config: SteeringConfig) -> None:
        """Adds an adapter and registers the hook of its site.

        Raises:
            ValueError: The block does not have the site.
        """
        site = self.anatomy.site(config.site)
        adapter = self.adapter_class(config)(site.width, config)
        adapter.reset_parameters(identity=config.init_weights)
        adapter.train(self.training)
        self.adapters[adapter_name] = adapter
        for name in self._hooked_sites(adapter) - self._hooked:
            SiteHook(self, self.anatomy.site(name)).register()
            self._hooked.add(name)
        self.cast_to_block(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        adapter.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in [`~peft.tuners.tuners_utils.BaseTunerLayer`]. While an adapter is added, the others stay trainable or
        frozen as they are."""
        added = current_only_adapter()
        if added is None:
            super().set_adapter(adapter_names, inference_mode)
            return
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if added in self.adapters:
            self.adapters[added].requires_grad_(added in self._active_adapter and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._remove_hooks(self._hooked.difference(*map(self._hooked_sites, self.adapters.values())))

    def _hooked_sites(self, adapter: Any) -> set[str]:
        """The sites at which an adapter needs a hook; see [`_keep_prompt_for`] for the second."""
        return {adapter.site} if adapter.positions == ALL else {adapter.site, "post_block"}

    def remove(self) -> None:
        """Removes this layer and its hooks from the block."""
        self._remove_hooks(self._hooked)
        delattr(self.get_base_layer(), self.layer_name)

    def _remove_hooks(self, sites: set[str]) -> None:
        """Removes the hooks of sites, also from the copies that PEFT makes for `modules_to_save`."""
        if not sites:
            return
        for module in self.get_base_layer().modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if self._is_own_hook(hook, sites)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        self._hooked = self._hooked - sites

    def _is_own_hook(self, hook: Any, sites: set[str]) -> bool:
        owner = getattr(hook, "__self__", None)
        return isinstance(owner, SiteHook) and owner.layer_name == self.layer_name and owner.site.name in sites

    def forward(
        self, hidden: torch.Tensor, adapter_names: Sequence[str] | BatchRows | None = None, site: str | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor`): (batch, sequence, d) or (batch * sequence, d), the hidden state at the site.
            adapter_names (`Sequence[str]` or [`BatchRows`], *optional*):
                The adapter for each row of `hidden`, `"__base__"` for none. Default: the active adapters for all rows.
            site (`str`, *optional*): Apply only the adapters at this site. Default: all adapters.

        Returns:
            `torch.Tensor`: Shape and dtype of `hidden`.
        """
        if self._disable_adapters:
            return hidden
        if adapter_names is not None:
            rows = adapter_names if isinstance(adapter_names, BatchRows) else BatchRows(adapter_names)
            return self._forward_per_row(hidden, rows, site)
        # Plain dictionaries and few calls, because this runs in every block for every decoded token.
        adapters = self.adapters._modules
        active, merged, steered = self._active_adapter, self.merged_adapters, None
        for name in (active,) if isinstance(active, str) else active:
            adapter = adapters.get(name)
            if adapter is not None and name not in merged and (site is None or adapter.site == site):
                if merged:
                    self._check_merged_beside(name, adapter)
                scaling = self.effective_scaling(name, adapter)
                if adapter.positions == ALL:
                    steered = adapter(hidden, steered, scaling=scaling)
                else:
                    steered = edit_tokens(adapter, hidden, steered, scaling, self._current_prompt())
        steered = hidden if steered is None else steered
        if self._prompt is not None and site == "post_block":
            self._keep_prompt_for(steered)
        return steered

    def _current_prompt(self) -> Prompt:
        """The prompt of the forward pass that runs.

        Raises:
            RuntimeError: None runs.
        """
        # In the backward pass, gradient checkpointing runs the block again.
        is_backward = torch._C._current_graph_task_id() != -1
        prompt = self._prompt if is_backward else current_prompt()
        if prompt is None:
            raise RuntimeError(
                "The adapter edits some tokens of the prompt, and where the prompt is follows from how the model is "
                "called. Call the whole model, not its decoder or a block."
            )
        self._prompt = prompt
        return prompt

    def _keep_prompt_for(self, output: torch.Tensor) -> None:
        """Has the backward pass through a block's output begin with the prompt of this forward pass, since there may
        have been others in between."""
        prompt = self._prompt

        def restore_prompt(gradient: torch.Tensor) -> None:
            self._prompt = prompt

        if output.requires_grad:
            output.register_hook(restore_prompt)

    def _check_merged_beside(self, name: str, adapter: Any) -> None:
        """Active adapters must get the same hidden state. Next to a merged one, this only works for offsets."""
        others = [self.adapters[other] for other in self.merged_adapters if other in self.adapters]
        others = [other for other in others if other.site == adapter.site]
        if others and not all(each.is_offset for each in (adapter, *others)):
            raise ValueError(
                f"Adapter {name!r} is active in a block where {', '.join(self.merged_adapters)} is merged, so it "
                "would get a hidden state that is already steered. Merge the adapters together with `merge_adapter`, "
                "or call `unmerge_adapter`."
            )

    @torch.compiler.disable  # rows are sorted on the CPU
    def _forward_per_row(self, hidden: torch.Tensor, rows: BatchRows, site: str | None) -> torch.Tensor:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        h = steered = rows.view(hidden)
        is_kept = not torch.is_grad_enabled()  # the graph of stacked weights is only good for one backward pass
        groups = rows.groups.get((self, site)) if is_kept else None
        if groups is None:
            groups = self._groups(rows, site)
            if is_kept:  # but from the second time on, because a single forward pass does not need them again
                rows.groups[self, site] = groups if (self, site) in rows.groups else None
        for group in groups:
            steered = group.steer(h, steered, None if group.positions == ALL else self._current_prompt())
        return steered.view(hidden.shape)

    def _groups(self, rows: BatchRows, site: str | None) -> list[AdapterGroup]:
        """The adapters of a batch that this block has, by what they have in common."""
        members: dict[Any, list[tuple[int, SteeringAdapter, float]]] = {}
        adapters: dict[str, Any] = self.adapters._modules
        for index, name in enumerate(rows.unique):
            adapter = adapters.get(name)
            if adapter is not None and (site is None or adapter.site == site):
                # Code of others around its forward, such as offloading or pruning, runs only if the adapter is called.
                is_wrapped = adapter._forward_pre_hooks or adapter._forward_hooks or "forward" in vars(adapter)
                kind = None if is_wrapped else adapter.batch_key()
                key = (name, None) if kind is None else (kind, adapter.positions)
                members.setdefault(key, []).append((index, adapter, self.effective_scaling(name, adapter)))
        return [AdapterGroup(rows, group, key[1] is None) for key, group in members.items()]

    def effective_scaling(self, name: str, adapter: Any) -> float:
        """The scaling of an adapter in the current context."""
        return current_scaling(adapter) if adapter.contexts else adapter.scaling

    # Merging

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            # The block has already run when its hook is called, too late to remove a merged update.
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing, since the adapters are already merged by the tuner's `merge_adapter`, which runs the model to
        check that merging is exact."""

    def unmerge(self) -> None:
        """Restores the weights and biases that updates were merged into, bit for bit."""
        unmerge(self)

    # Devices

    def move_to_execution_device(self, adapter_name: str, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Moves an adapter to the execution device of its block. Its dtype does not change.

        Args:
            adapter_name (`str`): The name of the adapter.
            weights (`dict[str, torch.Tensor]`, *optional*):
                The adapter's weights, if accelerate has offloaded it together with its block. They are not in
                accelerate's offload folder, so the adapter is restored and stays on the execution device.
        """
        if adapter_name not in self.adapters:
            return
        adapter = self.adapters[adapter_name]
        hook: Any = getattr(adapter, "_hf_hook", None)
        if weights is not None and getattr(hook, "offload", False):
            hook.weights_map = weights  # removing the hook restores the weights from it
            remove_hook_from_module(adapter)
        device, _ = self._block_device_and_dtype()
        if device is not None and not adapter.is_offloaded():
            adapter.to(device)

    def cast_to_block(self, adapter_name: str) -> None:
        """Casts an adapter to the floating point format of its block."""
        if adapter_name in self.adapters and not self.adapters[adapter_name].is_offloaded():
            self.adapters[adapter_name].to(dtype=self._block_device_and_dtype()[1])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.adapters:
            return
        adapter = self.adapters[adapter_name]
        if not adapter.is_offloaded():
            # Not to its dtype: PEFT also calls this after `low_cpu_mem_usage` loading, which would round the weights.
            adapter.to(device=device if device is not None else self._block_device_and_dtype()[0])

    def _block_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        """The execution device of the block and the dtype of its weights, `None` where they cannot be determined.

        Offloaded weights are on the meta device, so that the execution device is read from accelerate's hook.
        Quantized weights are integers, so that the dtype is that of norms and biases.
        """
        modules = [module for _, module in modules_outside_adapters(self.get_base_layer())]
        weights = [p for module in modules for p in module._parameters.values() if p is not None]
        dtype = next((p.dtype for p in weights if p.dtype.is_floating_point and p.dtype.itemsize > 1), None)
        device = next((p.device for p in weights if not p.is_meta), None)
        for module in modules:
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
        """The most recent replica of this layer by `nn.DataParallel` on the device of `hidden`."""
        for known in reversed(self._replicas):
            replica = known()
            if replica is not None and hidden.device in replica.devices():
                return replica
        return self

    def devices(self) -> set[torch.device]:
        """Devices of the adapters' weights. Those of a replica are plain tensors, not parameters."""
        tensors = [
            value
            for adapter in self.adapters.values()
            for value in (*vars(adapter).values(), *adapter.parameters())
            if isinstance(value, torch.Tensor)
        ]
        return {tensor.device for tensor in tensors}
