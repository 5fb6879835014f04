"""Checks on tensors that come from a file, before any of them reaches the model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import PostBlockSteeringLayer


def adapter_parameters(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Keys, as in `model.state_dict()`, and parameters of one adapter."""
    for name, layer in model.named_modules():
        if isinstance(layer, PostBlockSteeringLayer) and adapter_name in layer.steering_adapter:
            for leaf, parameter in layer.steering_adapter[adapter_name].named_parameters():
                yield f"{name}.steering_adapter.{adapter_name}.{leaf}", parameter


def check_adapter_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Makes sure that `tensors` is this adapter, whole and finite, and nothing that would overwrite the base model.

    PEFT itself only warns of what is missing, and loads what is extra.

    Args:
        model (`nn.Module`): Model with the adapter in place.
        adapter_name (`str`): The adapter that is about to be loaded.
        tensors (`dict[str, torch.Tensor]`): What was read, under keys of `model.state_dict()`.

    Raises:
        ValueError: Tensors are missing, unknown, of another shape, not floating point, or not finite. Each is named.
    """
    expected = dict(adapter_parameters(model, adapter_name))
    allowed = _prefixes_of_other_saved_modules(model)
    problems = []
    for key, parameter in expected.items():
        shape = tuple(parameter.shape)
        if key not in tensors:
            problems.append(f"{_file_key(key, adapter_name)} is missing, the model expects shape {shape}")
            continue
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            problems.append(
                f"{_file_key(key, adapter_name)} has shape {tuple(tensor.shape)}, the model expects {shape}"
            )
        elif not tensor.is_floating_point():
            problems.append(f"{_file_key(key, adapter_name)} has dtype {tensor.dtype}, floating point is expected")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{_file_key(key, adapter_name)} holds NaN or infinite values")
    for key in tensors:
        if key not in expected and not key.startswith(allowed):
            problems.append(f"{key} has shape {tuple(tensors[key].shape)} but no place in this adapter")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError(
            f"The weights of adapter {adapter_name!r} do not fit, so nothing was loaded:\n- "
            + "\n- ".join(shown)
            + "\nCheck that the adapter was trained on this base model and that its folder is complete."
        )


def _file_key(key: str, adapter_name: str) -> str:
    """The name of the tensor in the file, where the adapter has no name."""
    head, _, leaf = key.rpartition(f".{adapter_name}.")
    return f"{head}.{leaf}"


def _prefixes_of_other_saved_modules(model: nn.Module) -> tuple[str, ...]:
    """`modules_to_save`, trainable tokens, and embeddings (PEFT saves those of a resized vocabulary)."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        if hasattr(model, getter):
            embeddings.append(getattr(model, getter)())
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or any(module is embedding for embedding in embeddings)
    )
