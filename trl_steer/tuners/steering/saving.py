"""Gathers sharded tensors before they are saved, and checks that all of them are complete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from .folder import listed

_ADVICE = (
    "Save a gathered state dict: `state_dict = accelerator.get_state_dict(model)` on every process, then "
    "`save_pretrained(..., state_dict=state_dict)` on the main process. Trainers do this in `save_model`; set "
    "`zero3_save_16bit_model: true` for DeepSpeed ZeRO-3, and `fsdp_state_dict_type: FULL_STATE_DICT` for FSDP."
)


def gather_tensors(
    adapter_name: str, tensors: dict[str, torch.Tensor], is_matrix: Callable[[str], bool] = lambda key: False
) -> dict[str, torch.Tensor]:
    """Gathers the sharded tensors of an adapter.

    Only a `DTensor` (FSDP2) can be gathered. This is a collective operation: `save_pretrained` must be called on all
    processes, with `is_main_process`. Parameters partitioned by ZeRO-3 (which have no elements) or sharded by FSDP1
    (flat tensors or `ShardedTensor`s) raise an error.

    Args:
        adapter_name (`str`): The adapter to be saved.
        tensors (`dict[str, torch.Tensor]`): All of its tensors.
        is_matrix (`Callable`): Whether the tensor with a key has two dimensions.

    Raises:
        ValueError: There are no tensors, or some are sharded and cannot be gathered. The message lists them.
    """
    # On processes other than the main one, a gathered state dict is empty and nothing is written.
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not tensors and not (group and torch.distributed.get_rank() > 0):
        raise ValueError(f"The state dict to save has no tensors of adapter {adapter_name!r}. " + _ADVICE)
    gathered = {
        key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for key, tensor in tensors.items()
    }
    problems = [
        f"{key} {problem}" for key, tensor in gathered.items() if (problem := _problem(tensor, is_matrix(key)))
    ]
    if problems:
        raise ValueError(
            f"Adapter {adapter_name!r} was not saved, because some of its tensors are sharded:\n- "
            f"{listed(problems)}\n{_ADVICE}"
        )
    return gathered


def check_tensor_names(adapter_name: str, keys: Iterable[str], container: str, names: Collection[str]) -> None:
    """Checks that the tensors to save are those of the adapter, and not the ones from which pruning or a
    parametrization computes them.

    Args:
        adapter_name (`str`): The adapter to be saved.
        keys (`Iterable[str]`): Keys of all of its tensors.
        container (`str`): The part of a key before the name of a tensor of the adapter.
        names (`Collection[str]`): Names of these tensors.

    Raises:
        ValueError: There are tensors with other names.
    """
    unexpected = [key for key in keys if container in key and key.partition(container)[2] not in names]
    if unexpected:
        raise ValueError(
            f"Adapter {adapter_name!r} was not saved, because its weights are computed by pruning or a "
            f"parametrization from {', '.join(unexpected[:4])}, which an adapter folder cannot store. Make the "
            "weights permanent first, with `torch.nn.utils.prune.remove` or "
            "`torch.nn.utils.parametrize.remove_parametrizations`."
        )


def check_other_names(adapter_name: str, layers: Iterable[str], other_names: Iterable[str]) -> None:
    """Checks that no tensors are missing because of the name of another adapter. PEFT leaves out all tensors with such
    a name anywhere in their keys, unless none would be left. For an adapter `"1"`, these are those of block 1.

    Args:
        adapter_name (`str`): The adapter to be saved.
        layers (`Iterable[str]`): Names of its layers in the model.
        other_names (`Iterable[str]`): Names of the other adapters.

    Raises:
        ValueError: Another adapter has such a name.
    """
    parts = [layer.split(".") for layer in layers]
    confused = [name for name in other_names if 0 < sum(name in each for each in parts) < len(parts)]
    if confused:
        raise ValueError(
            f"Adapter {adapter_name!r} was not saved, because other adapters are called {', '.join(confused)}, "
            "like some blocks, and PEFT would leave out the tensors of these blocks. Delete these adapters, or load "
            "them under other names."
        )


def gather_auxiliary_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Gathers the tensors that are saved with an adapter, in place: `modules_to_save` and `trainable_token_indices`.

    PEFT reads these from `state_dict`, a filtered copy of the model's, after it has called the tuner for its own
    tensors. Embeddings that PEFT saves after the vocabulary was resized are not gathered: safetensors raises an error
    if they are sharded.

    Raises:
        ValueError: As [`gather_tensors`].
    """
    others = {key: state_dict[key] for key in auxiliary_keys(model, adapter_name) if key in state_dict}
    if others:
        state_dict.update(gather_tensors(adapter_name, others))


def auxiliary_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """Keys in `model.state_dict()` of an adapter's `modules_to_save` and `trainable_token_indices`."""
    return [
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    ]


def _problem(tensor: Any, is_matrix: bool) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return None  # bitsandbytes also saves strings
    if hasattr(tensor, "local_shards"):
        return "is a ShardedTensor"
    if tensor.numel() == 0:
        return f"has shape {tuple(tensor.shape)}, without elements"
    if is_matrix and tensor.dim() < 2:
        return f"has shape {tuple(tensor.shape)}, expected a matrix"
    return None
