"""Checks on tensors that come from a file, before any of them reaches the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from torch import nn

from ..blocks import text_config
from .layer import PostBlockSteeringLayer
from .saving import auxiliary_keys


def check_base_model_type(config: Any, model: nn.Module) -> None:
    """Makes sure that an adapter read from a folder is for this type of model, if both say what they are.

    Raises:
        ValueError: They are of different types.
    """
    theirs, ours = config.base_model_type, getattr(text_config(model), "model_type", None)
    if theirs and ours and theirs != ours:
        name = f", {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
        raise ValueError(
            f"This adapter was trained on a model of type {theirs!r}, and the base model is of type {ours!r}, whose "
            f"hidden states mean something else, even if the shapes fit. Load the one that it was trained on{name}. "
            "If you know that it fits this one too, set base_model_type to null in its adapter_config.json."
        )


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


def settle(model: nn.Module, adapter_name: str) -> None:
    """Notes that the weights of an adapter are there, or can be."""
    for adapter in _steering_adapters(model, adapter_name):
        adapter.awaits_weights = False


def take_back(model: Any, adapter_name: str) -> None:
    """Leaves nothing behind of an adapter whose weights turned out not to fit, if it was made for them."""
    if not isinstance(model, PeftModel) or not any(
        adapter.awaits_weights for adapter in _steering_adapters(model, adapter_name)
    ):
        return
    tuner: Any = model.base_model
    if set(tuner.peft_config) == {adapter_name}:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)


def materialize_tokens(model: nn.Module, adapter_name: str) -> None:
    """Gives trainable tokens that were created empty the values of the base model.

    Should loading fail, PEFT's embedding layer would otherwise look for them in an empty place at every call.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and adapter_name in module.trainable_tokens_delta:
            delta: Any = module.trainable_tokens_delta[adapter_name]
            if delta.is_meta and not module.weight.is_meta:
                rows = module.weight.detach()[module.token_indices[adapter_name]].to(delta.dtype)
                module.trainable_tokens_delta[adapter_name] = nn.Parameter(rows, requires_grad=delta.requires_grad)


def keep_until_dispatched(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Lets adapters hold on to `tensors` where PEFT is going to dispatch a model with offloaded weights once more."""
    if not {"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()):
        return
    for name, layer in model.named_modules():
        if isinstance(layer, PostBlockSteeringLayer) and adapter_name in layer.adapters:
            adapter: Any = layer.adapters[adapter_name]
            prefix = f"{name}.{layer.adapter_layer_names[0]}.{adapter_name}."
            adapter.loaded = {leaf: tensors[prefix + leaf] for leaf, _ in adapter.named_parameters()}


def _steering_adapters(model: nn.Module, adapter_name: str) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, PostBlockSteeringLayer)]
    return [layer.adapters[adapter_name] for layer in layers if adapter_name in layer.adapters]


def _problem(tensor: torch.Tensor, place: torch.Tensor | None) -> str | None:
    shape = tuple(tensor.shape)
    if place is None:
        return f"has shape {shape} but no place in this adapter"
    if shape != tuple(place.shape):
        return f"has shape {shape}, the model expects {tuple(place.shape)}"
    if place.is_floating_point() and not tensor.is_floating_point():
        return f"has dtype {tensor.dtype}, floating point is expected"
    # As the model will have it: a value that is finite in float32 need not be in float16.
    if not torch.isfinite(tensor.to(place.dtype)).all():
        return f"holds NaN or infinite values in {str(place.dtype).removeprefix('torch.')}"
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
