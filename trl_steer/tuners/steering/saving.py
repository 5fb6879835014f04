"""Makes sure that only whole tensors are saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

_ADVICE = (
    "Save from a gathered state dict: `state_dict = accelerator.get_state_dict(model)` on every process, then "
    "`save_pretrained(..., state_dict=state_dict)` on the first. Trainers do so in `save_model`; they need "
    "`zero3_save_16bit_model: true` under DeepSpeed ZeRO-3, and `fsdp_state_dict_type: FULL_STATE_DICT` under FSDP."
)


def gather_tensors(
    adapter_name: str, tensors: dict[str, torch.Tensor], is_matrix: Callable[[str], bool] = lambda key: False
) -> dict[str, torch.Tensor]:
    """Gathers what is sharded, and refuses what cannot be gathered.

    A `DTensor` (FSDP2) is gathered, which takes all processes: each has to save, with `is_main_process` telling which
    one writes. What ZeRO-3 leaves behind of a parameter (no elements), what FSDP version 1 makes of it (a flat piece,
    a `ShardedTensor`) and a state dict without the adapter are refused.

    Args:
        adapter_name (`str`): The adapter that is about to be saved.
        tensors (`dict[str, torch.Tensor]`): All of its tensors.
        is_matrix (`Callable`): Whether the tensor of a key has two dimensions.

    Raises:
        ValueError: A tensor is not whole, or there is none. The message names them.
    """
    # On processes other than the first, a gathered state dict is empty, and nothing is written.
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not tensors and not (group and torch.distributed.get_rank() > 0):
        raise ValueError(f"The state dict to save holds no tensor of adapter {adapter_name!r}. " + _ADVICE)
    whole = {key: _gathered(tensor) for key, tensor in tensors.items()}
    problems = [f"{key} {problem}" for key, tensor in whole.items() if (problem := _problem(tensor, is_matrix(key)))]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError(
            f"Tensors of adapter {adapter_name!r} are not whole, so it was not saved:\n- "
            + "\n- ".join(shown)
            + f"\n{_ADVICE}"
        )
    return whole


def check_leaves(adapter_name: str, tensors: Iterable[str], place: str, leaves: Collection[str]) -> None:
    """Makes sure that an adapter's own tensors are what is saved, and nothing that they are computed from.

    Args:
        adapter_name (`str`): The adapter that is about to be saved.
        tensors (`Iterable[str]`): Keys of all of its tensors.
        place (`str`): What stands in a key before the name of a tensor of the adapter.
        leaves (`Collection[str]`): Names of these tensors.

    Raises:
        ValueError: There are others in their places, as pruning and parametrizations put there.
    """
    strays = [key for key in tensors if place in key and key.partition(place)[2] not in leaves]
    if strays:
        raise ValueError(
            f"Adapter {adapter_name!r} was not saved, since its weights are computed from others (pruning or a "
            f"parametrization), which an adapter folder has no place for: {', '.join(strays[:4])}. Make them "
            "permanent first, with `torch.nn.utils.prune.remove` or "
            "`torch.nn.utils.parametrize.remove_parametrizations`."
        )


def gather_auxiliary_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """The same, in place, for what is saved beside an adapter: `modules_to_save` and trained tokens.

    PEFT takes these out of `state_dict` after it has asked the tuner for its tensors, and has no hook there. The
    dictionary is a filtered copy of PEFT's own, which is why writing to it changes nothing else. Embeddings that PEFT
    adds after resizing the vocabulary are not covered: safetensors refuses them while they are sharded.

    Raises:
        ValueError: As [`gather_tensors`].
    """
    others = {key: state_dict[key] for key in auxiliary_keys(model, adapter_name) if key in state_dict}
    if others:
        state_dict.update(gather_tensors(adapter_name, others))


def auxiliary_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """Keys of `model.state_dict()` under which `modules_to_save` and trained tokens of an adapter are."""
    return [
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    ]


def _gathered(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _problem(tensor: Any, is_matrix: bool) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return None  # bitsandbytes saves strings too
    if hasattr(tensor, "local_shards"):
        return "is a ShardedTensor"
    if tensor.numel() == 0:
        return f"has shape {tuple(tensor.shape)}, which holds nothing"
    if is_matrix and tensor.dim() < 2:
        return f"has shape {tuple(tensor.shape)}, a matrix is expected"
    return None
