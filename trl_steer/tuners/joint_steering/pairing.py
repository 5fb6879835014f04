"""Finds the LoRA matrices that the steering update of each block has to be orthogonal to."""

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
from ..steering.matching import name_matches
from ..steering.sites import BlockAnatomy


class NormGain:
    """
    The factor of a norm on each feature. Not cached, since the norm may be trained, and FSDP2 shards its weight.

    Args:
        norm (`nn.Module`): An RMS norm or layer norm with a weight (d,).
    """

    def __init__(self, norm: Any):
        self.norm = norm
        self.offset = 0.0
        if not isinstance(norm, nn.LayerNorm):
            # Gemma's norms multiply by `1 + weight`.
            ones = torch.ones_like(norm.weight.detach(), dtype=torch.float32)
            of_zero = torch.func.functional_call(norm, {"weight": torch.zeros_like(ones)}, (ones[None],))
            self.offset = float(of_zero.mean().round())

    def scale_rows(self, B: torch.Tensor) -> torch.Tensor:
        """`diag(gamma) B`, (d, r_lora), in float64, since rounding would change small singular vectors of `B`."""
        gain = (self.norm.weight.detach().double() + self.offset).to(B.device).unsqueeze(1)
        if isinstance(B, DTensor) and not isinstance(gain, DTensor):
            gain = distribute_tensor(gain, B.device_mesh, [Shard(0)])
        return B.double() * gain


@dataclass
class Pair:
    """A steered block and its LoRA layers that write to the residual stream.

    Attributes:
        name (`str`): Name of the block.
        steering ([`SteeringLayer`]): Its steering layer.
        lora_layers (`list[tuple[LoraLayer, NormGain | None]]`):
            The LoRA layers, each with the gain of the norm between it and the residual addition, if there is one.
    """

    name: str
    steering: SteeringLayer
    lora_layers: list[tuple[LoraLayer, NormGain | None]]

    def output_matrices(self, adapter_name: str) -> list[torch.Tensor]:
        """The matrices (d, r_lora) whose columns span the output of LoRA: `B`, or `diag(gamma) B` before a norm."""
        matrices = []
        for lora, gain in self.lora_layers:
            B = _output_matrix(lora.lora_B[adapter_name]).detach()
            matrices.append(B if gain is None else gain.scale_rows(B))
        return matrices

    def steering_matrix(self, adapter_name: str, side: str) -> nn.Parameter:
        """The steering weight: `W_up` (d, r) or the vector (d,) for `side="output"`, `W_down` (r, d) for `"input"`."""
        adapter: Any = self.steering.adapters[adapter_name]
        if side == "input":
            return adapter.down
        return adapter.up if hasattr(adapter, "up") else adapter.vector


def find_pairs(
    model: nn.Module, adapter_name: str, modules: Sequence[str] | None = None, norms: bool = True
) -> list[Pair]:
    """
    Pairs each steered block with its LoRA layers that write to the residual stream.

    If a block ends in a norm *after* the residual addition (OPT-350m, with `do_layer_norm_before=False`), the pairs do
    not take this norm into account.

    Args:
        model (`nn.Module`): A model with a joint adapter.
        adapter_name (`str`): The name of the adapter.
        modules (`Sequence[str]`, *optional*):
            Names, or ends of names, of the modules in a block to pair with. Default: the last linear layer of the MLP
            whose output has the width of the residual stream, or the last such layer outside the attention if no
            module is an MLP.
        norms (`bool`, defaults to `True`):
            Whether to take the norm between LoRA and the residual addition into account, if there is one.

    Raises:
        ValueError: There are no such modules, LoRA does not target any of them, or the ranks exceed the hidden size.
    """
    pairs: list[Pair] = []
    unknown = set(modules or ())
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, SteeringLayer) or adapter_name not in layer.adapters:
            continue
        name, anatomy = layer_name.rpartition(".")[0], layer.anatomy
        wanted = _wanted_modules(name, anatomy, modules)
        unknown -= {m for m in unknown if any(name_matches(n, m) for n in wanted)}
        lora_layers: list[Any] = [
            (anatomy.block.get_submodule(n), _gain_after(anatomy, n, adapter_name) if norms else None)
            for n in wanted
            if _has_adapter(anatomy.block.get_submodule(n), adapter_name)
        ]
        _check_ranks_fit(name, layer, adapter_name, lora_layers)
        pairs.append(Pair(name, layer, lora_layers))
    if not pairs:
        raise ValueError(
            f"There is nothing to constrain, because adapter {adapter_name!r} steers no block of this model. Use a "
            "JointSteeringConfig, or set orthogonal=False."
        )
    if unknown:
        raise ValueError(
            f"orthogonal_modules contains {sorted(unknown)}, but no steered block has a linear layer with such a name "
            "that writes to the residual stream. Remove them."
        )
    if not any(pair.lora_layers for pair in pairs):
        raise ValueError(
            f"There is nothing to be orthogonal to, because LoRA adapter {adapter_name!r} does not target any of the "
            "modules that write to the residual stream "
            f"({'the last linear layer of the MLPs' if modules is None else list(modules)}). Add them to "
            "target_modules, choose others with orthogonal_modules, or set orthogonal=False."
        )
    return [pair for pair in pairs if pair.lora_layers]


def _wanted_modules(name: str, anatomy: BlockAnatomy, modules: Sequence[str] | None) -> list[str]:
    """Names of the linear layers of a block to pair with."""
    if modules is None:
        last = anatomy.mlp_output()
        if last is not None:
            return [last]
        reason = (
            f"none outside its attention has an output of width {anatomy.hidden_size}. Choose one with "
            "orthogonal_modules, or set orthogonal=False."
        )
    else:
        linears = anatomy.residual_linear_layers()
        wanted = [n for n in linears if any(name_matches(n, m) for m in modules)]
        if wanted:
            return wanted
        reason = (
            f"none with an output of width {anatomy.hidden_size} is one of {list(modules)}. Choose from {linears}."
        )
    raise ValueError(f"{name} has no linear layer for steering to be orthogonal to: {reason}")


def _output_matrix(lora_B: Any) -> torch.Tensor:
    """LoRA's `B`, (d, r_lora). BD-LoRA stores only its diagonal blocks."""
    return lora_B.weight_as_blockdiagonal_matrix() if isinstance(lora_B, BlockDiagonalLinear) else lora_B.weight


@torch.no_grad()
def _gain_after(anatomy: BlockAnatomy, name: str, adapter_name: str) -> NormGain | None:
    """The gain of the norm after a module, or `None` if there is no such norm."""
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


def _check_ranks_fit(name: str, layer: SteeringLayer, adapter_name: str, lora_layers: list) -> None:
    rank = sum(lora.r[adapter_name] for lora, _ in lora_layers)
    steering = getattr(layer.adapters[adapter_name], "up", None)
    needed = 1 if steering is None else steering.shape[1]
    width = layer.anatomy.hidden_size
    if rank + needed > width:
        raise ValueError(
            f"In {name}, the sum of LoRA's rank {rank} and of steering's rank {needed} exceeds the hidden size "
            f"{width}, so steering cannot be orthogonal to LoRA. Use smaller ranks."
        )
