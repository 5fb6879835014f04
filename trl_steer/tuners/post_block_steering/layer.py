"""The module that sits in a block, and the adapters in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from .config import PostBlockSteeringConfig
from .operator import low_rank_update

# Name of the layer as a child of the block: part of every key in an adapter file.
LAYER_NAME = "post_block_steering"


class SteeringAdapter(nn.Module):
    """
    One adapter of one block. It owns all of its weights and is always invoked through `__call__`, so hooks that bring
    weights to where they are needed (accelerate's offloading, FSDP2, ZeRO-3) see every use.

    Attributes:
        scaling (`float`): Strength of the update.
        awaits_weights (`bool`): Made for a folder whose weights have not been loaded yet.
        created_empty (`bool`): Made without weights (`low_cpu_mem_usage`), which are still to be loaded.
        loaded (`dict[str, torch.Tensor]`, *optional*): Weights just read, while the model is still being dispatched.
    """

    scaling: float
    awaits_weights: bool = False
    created_empty: bool = False
    loaded: dict[str, torch.Tensor] | None = None

    def lacks_weights(self) -> bool:
        """Whether the weights that were to be loaded never came. Weights that are merely offloaded do not lack."""
        return self.created_empty and next(self.parameters()).is_meta and not hasattr(self, "_hf_hook")

    def stay_resident(self) -> None:
        """Takes an adapter back that accelerate has offloaded with its block.

        PEFT dispatches a model with offloaded weights once more after loading, and does not write down where on disk
        the adapter is. It is small: it stays where its block computes.
        """
        loaded, self.loaded = self.loaded, None
        hook: Any = getattr(self, "_hf_hook", None)
        if loaded is not None and getattr(hook, "offload", False):
            hook.weights_map = loaded  # from which removing the hook restores them
            remove_hook_from_module(self)

    def reset_parameters(self, identity: bool = True) -> None:
        """Draws the weights anew; `identity` makes the update exactly zero."""
        raise NotImplementedError

    def forward(self, h: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Returns `residual + update(h)`, `residual` being `h` unless given. All shapes (..., d)."""
        raise NotImplementedError


class LowRankAdapter(SteeringAdapter):
    """
    `h + scaling * dropout(act(h @ down.T)) @ up.T`.

    Args:
        hidden_size (`int`): Width `d` of the residual stream.
        config ([`PostBlockSteeringConfig`]): Rank, activation, dropout, scaling and initialization.

    Attributes:
        down (`nn.Parameter`): (r, d).
        up (`nn.Parameter`): (d, r), zero at first.
    """

    def __init__(self, hidden_size: int, config: PostBlockSteeringConfig):
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.r, hidden_size))
        self.up = nn.Parameter(torch.empty(hidden_size, config.r))
        self.scaling = config.scaling
        self.activation = None if config.activation is None else ACT2FN[config.activation]
        self.dropout = config.dropout
        self.init_scale = config.init_scale

    def reset_parameters(self, identity: bool = True) -> None:
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        with torch.no_grad():
            self.down.mul_(self.init_scale)
        if identity:
            nn.init.zeros_(self.up)
        else:
            nn.init.kaiming_uniform_(self.up, a=5**0.5)

    def forward(self, h: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        # Not as attributes, which `nn.Module` would have to search for: a decoded token notices.
        parameters: Any = self._parameters
        down, up = parameters["down"], parameters["up"]
        if down.is_meta and not h.is_meta:  # PyTorch's CPU matrix product would return garbage
            raise RuntimeError(
                "The weights of a steering adapter are offloaded and were not brought back before it ran. If the "
                "model was dispatched with `preload_module_classes`, leave the class of the blocks out of it."
            )
        return low_rank_update(h, down, up, self.scaling, self.activation, dropout, residual)

    def extra_repr(self) -> str:
        r, hidden_size = self.down.shape
        return f"hidden_size={hidden_size}, r={r}, scaling={self.scaling}, dropout={self.dropout}"


class VectorAdapter(SteeringAdapter):
    """
    `h + scaling * vector`.

    Args:
        hidden_size (`int`): Width `d` of the residual stream.
        config ([`PostBlockSteeringConfig`]): Scaling.

    Attributes:
        vector (`nn.Parameter`): (d,), zero at first.
    """

    def __init__(self, hidden_size: int, config: PostBlockSteeringConfig):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(hidden_size))
        self.scaling = config.scaling

    def reset_parameters(self, identity: bool = True) -> None:
        if identity:
            nn.init.zeros_(self.vector)
        else:
            nn.init.normal_(self.vector, std=0.2)

    def forward(self, h: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        base, vector = h if residual is None else residual, self.vector
        if vector.dtype == base.dtype:
            return torch.add(base, vector, alpha=self.scaling)
        return base + (self.scaling * vector).to(base.dtype)

    def extra_repr(self) -> str:
        return f"hidden_size={len(self.vector)}, scaling={self.scaling}"


ADAPTERS: dict[str, type[SteeringAdapter]] = {"low_rank": LowRankAdapter, "vector": VectorAdapter}


class PostBlockSteeringLayer(nn.Module, BaseTunerLayer):
    """
    Steers the output of one block. It is a child of the block, `<block>.post_block_steering`, and acts through a
    forward hook on it, so no path of the base model changes.

    Several active adapters all read the same output, and their updates add.

    Args:
        block (`nn.Module`): The block. Kept as the "base layer", outside of the module tree.
        hidden_size (`int`): Width `d` of the residual stream.
    """

    adapter_layer_names = ("steering_adapter",)
    other_param_names = ()

    def __init__(self, block: nn.Module, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.merged_adapters: list[str] = []
        # For each merge, the module whose bias took the vectors, and that bias before and after.
        self.folded: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        # In a tuple, because a module attribute would make the block a child of its own child.
        self._block = (block,)
        # `prepend`: whatever else listens to the block, transformers' capture of hidden states for one, gets the
        # steered output. A bound method: a deep copy of the model then calls the copy of this layer.
        self._hook = block.register_forward_hook(self._steer, prepend=True)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters of this block by name."""
        return self._modules[self.adapter_layer_names[0]]  # type: ignore[return-value]

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    def remove(self) -> None:
        """Takes the hook and the layer itself out of the block."""
        self._hook.remove()
        delattr(self.get_base_layer(), LAYER_NAME)

    def update_layer(self, adapter_name: str, config: PostBlockSteeringConfig) -> None:
        """Adds an adapter. One that is about to be loaded starts as the identity: should loading fail, it stays so."""
        adapter = ADAPTERS[config.steering_type](self.hidden_size, config)
        adapter.reset_parameters(identity=config.init_weights or config.inference_mode or config.weights_follow)
        adapter.awaits_weights = config.weights_follow
        adapter.created_empty = next(adapter.parameters()).is_meta
        adapter.train(self.training)
        self.adapters[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden: torch.Tensor, adapter_names: Sequence[str] | None = None) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor`): (batch, sequence, d), the output of the block.
            adapter_names (`Sequence[str]`, *optional*):
                The adapter for each row of the batch, `"__base__"` for none. By default the active adapters, for all.

        Returns:
            `torch.Tensor`: (batch, sequence, d), dtype of `hidden`.
        """
        if self._disable_adapters:
            return hidden
        if adapter_names is not None:
            return self._forward_per_sample(hidden, adapter_names)
        # Plain dictionaries and few calls: this runs for every block of every token, with caches full of weights.
        adapters: Any = self.adapters._modules
        active, merged, steered = self._active_adapter, self.merged_adapters, None
        for name in (active,) if isinstance(active, str) else active:
            adapter = adapters.get(name)
            if adapter is not None and name not in merged and not (adapter.created_empty and adapter.lacks_weights()):
                steered = adapter(hidden, steered)
        return hidden if steered is None else steered

    def _forward_per_sample(self, hidden: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, call `unmerge_adapter()`.")
        if len(adapter_names) != len(hidden):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(hidden)} respectively."
            )
        steered = hidden.clone()
        for name in sorted(set(adapter_names) & set(self.adapters)):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            steered[rows] = self.adapters[name](hidden[rows])
        return steered

    def _steer(self, block: nn.Module, args: tuple, output: Any):
        """The forward hook: the block's output with its hidden state replaced, out of place."""
        if isinstance(output, torch.Tensor):
            return self(output)
        if isinstance(output, tuple):
            steered = (self(output[0]), *output[1:])
            return type(output)(*steered) if hasattr(output, "_fields") else steered  # namedtuples stay what they are
        if isinstance(output, list):
            return [self(output[0]), *output[1:]]
        if isinstance(output, dict):
            key = next((key for key in ("hidden_states", "last_hidden_state") if key in output), next(iter(output)))
            output = copy.copy(output)
            output[key] = self(output[key])
            return output
        raise TypeError(
            f"{type(block).__name__} returned {type(output).__name__}; a steered block must return its hidden state "
            "as a tensor, first in a tuple or list, or in a ModelOutput."
        )

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            # The block runs before its hook, too late to take a folded vector back out there.
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("Merging looks at the whole model; call `merge_adapter()` of the tuner instead.")

    def unmerge(self) -> None:
        """Puts the bias that vectors were folded into back, bit for bit."""
        from .merging import unfold

        unfold(self)

    def move_to_execution_device(self, adapter_name: str) -> None:
        """Moves an adapter to where its block computes now, keeping its dtype; offloaded weights are left to hooks."""
        if adapter_name in self.adapters:
            adapter: Any = self.adapters[adapter_name]
            adapter.stay_resident()
            device, _ = self._block_device_and_dtype()
            if device is not None and not any(parameter.is_meta for parameter in adapter.parameters()):
                adapter.to(device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.adapters:
            return
        adapter: Any = self.adapters[adapter_name]
        if any(parameter.is_meta for parameter in adapter.parameters()):
            return
        adapter.created_empty = False
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
