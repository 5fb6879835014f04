"""Which LoRA matrices a steering update has to stay orthogonal to, found by structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import BlockDiagonalLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..steering.layer import SteeringLayer
from ..steering.sites import BlockAnatomy


class NormGain:
    """
    What a norm multiplies each feature by. Read at each use, since norms may be trained, and are sharded by FSDP2.

    Args:
        norm (`nn.Module`): An RMS norm or layer norm with a weight (d,).
    """

    def __init__(self, norm: Any):
        self.norm = norm
        self.offset = 0.0
        if not isinstance(norm, nn.LayerNorm):
            # Gemma's norms multiply by one plus their weight, so a weight of zero tells.
            ones = torch.ones_like(norm.weight.detach(), dtype=torch.float32)
            of_zero = torch.func.functional_call(norm, {"weight": torch.zeros_like(ones)}, (ones[None],))
            self.offset = float(of_zero.mean().round())

    def times(self, B: torch.Tensor) -> torch.Tensor:
        """`diag(gamma) B`, (d, r_lora). In float64: rounding would turn the small singular directions of `B`."""
        gain = (self.norm.weight.detach().double() + self.offset).to(B.device).unsqueeze(1)
        if isinstance(B, DTensor) and not isinstance(gain, DTensor):
            gain = distribute_tensor(gain, B.device_mesh, [Shard(0)])
        return B.double() * gain


@dataclass
class Pair:
    """A steered block and the LoRA layers that write into the residual stream there.

    Attributes:
        name (`str`): Name of the block.
        steering ([`SteeringLayer`]): Its steering layer.
        lora_layers (`list[tuple[LoraLayer, NormGain | None]]`):
            LoRA layers, each with the gain of the norm between it and the residual addition, if there is one.
    """

    name: str
    steering: SteeringLayer
    lora_layers: list[tuple[LoraLayer, NormGain | None]]

    def output_matrices(self, adapter_name: str) -> list[torch.Tensor]:
        """The matrices (d, r_lora) whose columns span what LoRA can write: `B`, or `diag(gamma) B` before a norm."""
        matrices = []
        for lora, gain in self.lora_layers:
            B = _output_matrix(lora.lora_B[adapter_name]).detach()
            matrices.append(B if gain is None else gain.times(B))
        return matrices

    def steering_matrix(self, adapter_name: str, side: str) -> nn.Parameter:
        """`W_up` (d, r) or the vector (d,) for `side="output"`, `W_down` (r, d) for `"input"`."""
        adapter: Any = self.steering.adapters[adapter_name]
        if side == "input":
            return adapter.down
        return adapter.up if hasattr(adapter, "up") else adapter.vector


def find_pairs(
    model: nn.Module, adapter_name: str, modules: Sequence[str] | None = None, norms: bool = True
) -> list[Pair]:
    """
    Pairs each steered block with the LoRA layers that write into the residual stream there.

    A block that ends in a norm *behind* the residual addition (OPT-350m, by `do_layer_norm_before=False`) mixes what
    LoRA writes with everything else there; the pairing is then about what comes in front of that norm.

    Args:
        model (`nn.Module`): A model with a joint adapter.
        adapter_name (`str`): The adapter.
        modules (`Sequence[str]`, *optional*):
            Names, or their endings, of the modules inside a block to pair with. By default the MLP's last linear
            layer whose output has the width of the residual stream; where no module is called an MLP, the last such
            layer outside of the attention.
        norms (`bool`, defaults to `True`):
            Whether the gain of a norm between LoRA and the residual addition counts.

    Raises:
        ValueError: There is nothing to pair with, LoRA misses it, or its rank leaves no room for steering.
    """
    pairs: list[Pair] = []
    unknown = set(modules or ())
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, SteeringLayer) or adapter_name not in layer.adapters:
            continue
        name, anatomy = layer_name.rpartition(".")[0], layer.anatomy
        wanted = _wanted_modules(name, anatomy, modules)
        unknown -= {m for m in unknown if any(_is_called(n, m) for n in wanted)}
        lora_layers: list[Any] = [
            (anatomy.block.get_submodule(n), _gain_after(anatomy, n, adapter_name) if norms else None)
            for n in wanted
            if _has_adapter(anatomy.block.get_submodule(n), adapter_name)
        ]
        _check_rank(name, layer, adapter_name, lora_layers)
        pairs.append(Pair(name, layer, lora_layers))
    if not pairs:
        raise ValueError(f"Adapter {adapter_name!r} steers no block of this model, so there is nothing to constrain.")
    if unknown:
        raise ValueError(
            f"orthogonal_modules names {sorted(unknown)}, but no steered block has a linear layer called "
            f"{sorted(unknown)} that writes into the residual stream."
        )
    if not any(pair.lora_layers for pair in pairs):
        raise ValueError(
            f"LoRA adapter {adapter_name!r} targets none of the modules that write into the residual stream "
            f"({'the last linear layer of the MLPs' if modules is None else list(modules)}), so the constraint would "
            "be empty. Add them to target_modules, choose others with orthogonal_modules, or set orthogonal=False."
        )
    return [pair for pair in pairs if pair.lora_layers]


def _wanted_modules(name: str, anatomy: BlockAnatomy, modules: Sequence[str] | None) -> list[str]:
    """Names of the linear layers of a block to pair with."""
    if modules is None:
        last = anatomy.mlp_output()
        if last is not None:
            return [last]
        reason = (
            f"outside of its attention, none has an output of width {anatomy.hidden_size}. Name one with "
            "orthogonal_modules, or set orthogonal=False."
        )
    else:
        linears = anatomy.residual_writers()
        wanted = [n for n in linears if any(_is_called(n, m) for m in modules)]
        if wanted:
            return wanted
        reason = (
            f"none of its linear layers of width {anatomy.hidden_size} is called {list(modules)}. They are {linears}."
        )
    raise ValueError(f"{name} has no linear layer to keep steering orthogonal to: {reason}")


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _output_matrix(lora_B: Any) -> torch.Tensor:
    """LoRA's `B` as (d, r_lora). BD-LoRA stores only the blocks on its diagonal."""
    return lora_B.weight_as_blockdiagonal_matrix() if isinstance(lora_B, BlockDiagonalLinear) else lora_B.weight


@torch.no_grad()
def _gain_after(anatomy: BlockAnatomy, name: str, adapter_name: str) -> NormGain | None:
    """The gain of the norm after a module, or `None` where there is no such norm."""
    norm_name = anatomy.norm_after(name)
    if norm_name is None:
        return None
    norm: Any = anatomy.block.get_submodule(norm_name)
    if isinstance(norm, ModulesToSaveWrapper):
        is_trained = adapter_name in norm.modules_to_save
        norm = norm.modules_to_save[adapter_name] if is_trained else norm.original_module
    return NormGain(norm)


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoraLayer) and adapter_name in module.lora_B


def _check_rank(name: str, layer: SteeringLayer, adapter_name: str, lora_layers: list) -> None:
    rank = sum(lora.r[adapter_name] for lora, _ in lora_layers)
    steering = getattr(layer.adapters[adapter_name], "up", None)
    needed = 1 if steering is None else steering.shape[1]
    width = layer.anatomy.hidden_size
    if rank + needed > width:
        raise ValueError(
            f"In {name} LoRA's rank {rank} and steering's rank {needed} together exceed the hidden size {width}, so "
            "no orthogonal complement is left to steer in. Lower one of the ranks."
        )
