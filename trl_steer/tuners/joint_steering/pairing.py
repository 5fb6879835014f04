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

from ..blocks import linear_layers, out_features
from ..post_block_steering import PostBlockSteeringLayer

# A norm of such a name in a block sits between the MLP and the residual addition (Gemma 2 and 3, OLMo 2, GLM 4).
# Blocks that have it have one in the same place after the attention: the first of those names that there is. In other
# blocks `post_attention_layernorm` is the MLP's input norm.
_NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_NORMS_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")


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
        steering ([`PostBlockSteeringLayer`]): Its steering layer.
        writers (`list[tuple[LoraLayer, NormGain | None]]`):
            LoRA layers, each with the gain of the norm between it and the residual addition, if there is one.
    """

    name: str
    steering: PostBlockSteeringLayer
    writers: list[tuple[LoraLayer, NormGain | None]]

    def output_matrices(self, adapter_name: str) -> list[torch.Tensor]:
        """The matrices (d, r_lora) whose columns span what LoRA can write: `B`, or `diag(gamma) B` before a norm."""
        matrices = []
        for lora, gain in self.writers:
            B = _whole(lora.lora_B[adapter_name]).detach()
            matrices.append(B if gain is None else gain.times(B))
        return matrices

    def steering_matrix(self, adapter_name: str, side: str) -> nn.Parameter:
        """`W_up` (d, r) or the vector (d,) for `side="output"`, `W_down` (r, d) for `"input"`."""
        adapter: Any = self.steering.adapters[adapter_name]
        if side == "input":
            return adapter.down
        return adapter.up if hasattr(adapter, "up") else adapter.vector


def find_pairs(model: nn.Module, adapter_name: str, modules: Sequence[str] | None = None) -> list[Pair]:
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

    Raises:
        ValueError: There is nothing to pair with, LoRA misses it, or its rank leaves no room for steering.
    """
    pairs: list[Pair] = []
    unknown = set(modules or ())
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, PostBlockSteeringLayer) or adapter_name not in layer.adapters:
            continue
        block, name = layer.get_base_layer(), layer_name.rpartition(".")[0]
        linears = [n for n, linear in linear_layers(block).items() if out_features(linear) == layer.hidden_size]
        outside = [n for n in linears if not _in_attention(n)]
        wanted = ([n for n in outside if _in_mlp(n)] or outside)[-1:]
        if modules is not None:
            wanted = [n for n in linears if any(_is_called(n, m) for m in modules)]
            unknown -= {m for m in unknown if any(_is_called(n, m) for n in wanted)}
        if not wanted:
            raise ValueError(
                f"{name} has no linear layer to keep steering orthogonal to: "
                + (
                    f"none of its linear layers of width {layer.hidden_size} is called {list(modules)}. "
                    f"They are {linears}."
                    if modules is not None
                    else f"outside of its attention, none has an output of width {layer.hidden_size}. Name one with "
                    "orthogonal_modules, or set orthogonal=False."
                )
            )
        writers = [
            (block.get_submodule(n), _gain_after(block, n, adapter_name))
            for n in wanted
            if _has_adapter(block.get_submodule(n), adapter_name)
        ]
        _check_rank(name, layer, adapter_name, writers)
        pairs.append(Pair(name, layer, writers))  # type: ignore[arg-type]
    if not pairs:
        raise ValueError(f"Adapter {adapter_name!r} steers no block of this model, so there is nothing to constrain.")
    if unknown:
        raise ValueError(
            f"orthogonal_modules names {sorted(unknown)}, but no steered block has a linear layer called "
            f"{sorted(unknown)} that writes into the residual stream."
        )
    if not any(pair.writers for pair in pairs):
        raise ValueError(
            f"LoRA adapter {adapter_name!r} targets none of the modules that write into the residual stream "
            f"({'the last linear layer of the MLPs' if modules is None else list(modules)}), so the constraint would "
            "be empty. Add them to target_modules, choose others with orthogonal_modules, or set orthogonal=False."
        )
    return [pair for pair in pairs if pair.writers]


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _in_mlp(name: str) -> bool:
    """Gemma 3n and Falcon-H1 have further layers that write into the residual stream behind their MLP."""
    return any(part in ("mlp", "ffn", "feed_forward") for part in name.lower().split("."))


def _whole(lora_B: Any) -> torch.Tensor:
    """LoRA's `B` as (d, r_lora). BD-LoRA stores only the blocks on its diagonal."""
    return lora_B.weight_as_blockdiagonal_matrix() if isinstance(lora_B, BlockDiagonalLinear) else lora_B.weight


@torch.no_grad()
def _gain_after(block: nn.Module, name: str, adapter_name: str) -> NormGain | None:
    """The gain of the norm after a module, or `None` where there is no such norm."""
    after_mlp = _first_child(block, _NORMS_AFTER_MLP)
    norm: Any = _first_child(block, _NORMS_AFTER_ATTENTION) if _in_attention(name) else after_mlp
    if after_mlp is None or norm is None:
        return None
    if isinstance(norm, ModulesToSaveWrapper):
        is_trained = adapter_name in norm.modules_to_save
        norm = norm.modules_to_save[adapter_name] if is_trained else norm.original_module
    return NormGain(norm)


def _first_child(block: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((getattr(block, name) for name in names if hasattr(block, name)), None)


def _has_adapter(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, LoraLayer) and adapter_name in module.lora_B


def _check_rank(name: str, layer: PostBlockSteeringLayer, adapter_name: str, writers: list) -> None:
    rank = sum(lora.r[adapter_name] for lora, _ in writers)
    steering = getattr(layer.adapters[adapter_name], "up", None)
    needed = 1 if steering is None else steering.shape[1]
    if rank + needed > layer.hidden_size:
        raise ValueError(
            f"In {name} LoRA's rank {rank} and steering's rank {needed} together exceed the hidden size "
            f"{layer.hidden_size}, so no orthogonal complement is left to steer in. Lower one of the ranks."
        )
