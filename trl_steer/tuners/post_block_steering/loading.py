"""Checks on tensors that come from a file, before any of them reaches the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import nn

from .layer import PostBlockSteeringLayer
from .saving import auxiliary_keys


def check_adapter_tensors(
    model: nn.Module,
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
    read: dict[str, torch.Tensor],
    biases: Collection[str] = (),
) -> None:
    """Makes sure that `tensors` is this adapter, whole and finite, and nothing that would overwrite the base model.

    PEFT itself only warns of what is missing, and loads what is extra.

    Args:
        model (`nn.Module`): Model with the adapter in place.
        adapter_name (`str`): The adapter that is about to be loaded.
        tensors (`dict[str, torch.Tensor]`): What was read, under keys of `model.state_dict()`.
        read (`dict[str, torch.Tensor]`): The same under the keys of the file.
        biases (`Collection[str]`): Keys of biases of the base model that were trained with the adapter.

    Raises:
        ValueError: Tensors are missing, unknown, of another shape, not floating point, or not finite. Each is named.
    """
    state = model.state_dict()
    required = _filter_state_dict_by_key_prefixes(state, _get_tuner_state_dict_key_prefixes(model, adapter_name))
    for key in biases:
        prefixed = f"base_model.model.{key}"  # in a file also where the model has no `PeftModel` around it
        required[prefixed if prefixed in tensors else key] = state[key]
    places = {**_other_saved_tensors(model, state, adapter_name, tensors), **required}
    problems = [
        f"{_file_key(key, adapter_name)} is missing, the model expects shape {tuple(parameter.shape)}"
        for key, parameter in required.items()
        if key not in tensors
    ]
    for key, tensor in tensors.items():
        problem = _problem(tensor, places.get(key))
        if problem:
            problems.append(f"{_file_key(key, adapter_name)} {problem}")
    if len(tensors) < len(read):  # two keys of the file mean the same parameter
        problems += [
            f"{key} has shape {tuple(read[key].shape)} and is there without {adapter_name!r} in its name too"
            for key in read.keys() & required.keys()
        ]
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError(
            f"The weights of adapter {adapter_name!r} do not fit, so nothing was loaded:\n- "
            + "\n- ".join(shown)
            + "\nCheck that the adapter was trained on this base model and that its folder is complete."
        )


def keep_until_dispatched(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Lets adapters hold on to `tensors` where PEFT is going to dispatch a model with offloaded weights once more."""
    if not {"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()):
        return
    for name, layer in model.named_modules():
        if isinstance(layer, PostBlockSteeringLayer) and adapter_name in layer.adapters:
            adapter: Any = layer.adapters[adapter_name]
            prefix = f"{name}.{layer.adapter_layer_names[0]}.{adapter_name}."
            adapter.loaded = {leaf: tensors[prefix + leaf] for leaf, _ in adapter.named_parameters()}


def _problem(tensor: torch.Tensor, place: torch.Tensor | None) -> str | None:
    shape = tuple(tensor.shape)
    if place is None:
        return f"has shape {shape} but no place in this adapter"
    if shape != tuple(place.shape):
        return f"has shape {shape}, the model expects {tuple(place.shape)}"
    if place.is_floating_point() and not tensor.is_floating_point():
        return f"has dtype {tensor.dtype}, floating point is expected"
    if not torch.isfinite(tensor).all():
        return "holds NaN or infinite values"
    return None


def _file_key(key: str, adapter_name: str) -> str:
    """The name of the tensor in the file, where the adapter has no name."""
    head, separator, leaf = key.rpartition(f".{adapter_name}.")
    return f"{head}.{leaf}" if separator else key.removesuffix(f".{adapter_name}")


def _other_saved_tensors(model: nn.Module, state: dict, adapter_name: str, tensors: dict) -> dict[str, torch.Tensor]:
    """Where tensors outside of the steering layers may go: `modules_to_save`, trainable tokens, embeddings.

    PEFT saves the embeddings of a resized vocabulary, always input and output together; one of them alone is a stray.
    """
    keys = set(auxiliary_keys(model, adapter_name))
    embeddings = _embeddings(model)
    groups = [
        {key for key in state if key.startswith(f"{name}.")}
        for name, module in model.named_modules()
        if module in embeddings
    ]
    if all(group & tensors.keys() for group in groups):
        keys = keys.union(*groups)
    return {key: state[key] for key in keys if key in state}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for module in (getter() for getter in getters if getter) if module is not None]
