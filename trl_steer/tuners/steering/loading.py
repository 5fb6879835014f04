"""Checks on an adapter before it is loaded into a model.

All checks are done at the injection, against the folder that PEFT or transformers is loading, see [`Load`]. If any of
them fails, [`restored_on_failure`] restores the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .folder import PREFIX, listed
from .matching import text_config
from .saving import auxiliary_keys

_COLLECTIONS = (dict, OrderedDict, list, set)


def check_base_model_type(config: Any, model: nn.Module, theirs: str | None) -> None:
    """Checks that an adapter was trained on a model of the same type. Passes if either type is unknown.

    Args:
        config ([`~peft.PeftConfig`]): The adapter's configuration.
        model (`nn.Module`): The model to load it into.
        theirs (`str`, *optional*): The `base_model_type` of the adapter.

    Raises:
        ValueError: The types are different.
    """
    ours = getattr(text_config(model), "model_type", None)
    if theirs and ours and theirs != ours:
        name = f", {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
        raise ValueError(
            f"This adapter was trained on a model of type {theirs!r}, but the base model is of type {ours!r}. Their "
            "hidden states have different meanings, even if the shapes match. Load the base model that the adapter "
            f"was trained on{name}. To use this one anyway, set base_model_type to null in adapter_config.json."
        )


def check_header(adapter_name: str, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Checks that a file has exactly the expected tensors, with the expected shapes and dtypes.

    Raises:
        ValueError: Tensors are missing, unexpected, of the wrong shape or not floating point. The message lists them.
    """
    problems = [_missing(key, tensor) for key, tensor in expected.items() if key not in given]
    problems += [
        f"{key} {problem}" for key, tensor in given.items() if (problem := _problem(tensor, expected.get(key)))
    ]
    _raise_if_any(problems, adapter_name)


def check_adapter_tensors(
    model: nn.Module,
    adapter_name: str,
    tensors: dict[str, torch.Tensor],
    read: Mapping[str, torch.Tensor],
    biases: Collection[str] = (),
    find_problem: Callable[[str, torch.Tensor], str | None] = lambda key, tensor: None,
) -> None:
    """Checks that `tensors` has all tensors of the adapter and no others, and that their values are finite.

    PEFT itself only warns about missing tensors, and loads unexpected ones, which can overwrite the base model.

    Args:
        model (`nn.Module`): The model, with the adapter injected.
        adapter_name (`str`): The adapter to be loaded.
        tensors (`dict[str, torch.Tensor]`): The tensors of the file by the keys of `model.state_dict()`.
        read (`Mapping[str, torch.Tensor]`): The same tensors by their keys in the file.
        biases (`Collection[str]`): Keys of the base model's biases that were trained with the adapter.
        find_problem (`Callable`): Says what is wrong with the values of the tensor with a key.

    Raises:
        ValueError: Tensors are missing, unexpected, of the wrong shape, not floating point, not finite, or have values
            that they cannot have. The message lists them.
    """
    state = model.state_dict()
    required = _filter_state_dict_by_key_prefixes(state, _get_tuner_state_dict_key_prefixes(model, adapter_name))
    for key in biases:
        prefixed = f"{PREFIX}{key}"  # a file has the prefix even if `model` is not wrapped in a `PeftModel`
        required[prefixed if prefixed in tensors else key] = state[key]
    auxiliary = {key: state[key] for key in auxiliary_keys(model, adapter_name) if key in state}
    required |= auxiliary
    places = {**_saved_embeddings(model, state, adapter_name, tensors), **required}
    problems = [
        _missing(_file_key(key, adapter_name), parameter) for key, parameter in required.items() if key not in tensors
    ]
    for key, tensor in tensors.items():
        problem = _problem(tensor, places.get(key)) or find_problem(key, tensor)
        if problem:
            problems.append(f"{_file_key(key, adapter_name)} {problem}")
    if len(tensors) < len(read):  # two keys of the file are for the same parameter
        problems += [
            f"{key} has shape {tuple(read[key].shape)} and is there twice, with and without {adapter_name!r}"
            for key in read.keys() & required.keys()
        ]
    _raise_if_any(problems, adapter_name)


def model_keys(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file by their keys in a model without a `PeftModel` around it, in the form in which PEFT passes
    them to a tuner: keys of `modules_to_save` and `trainable_token_indices` contain the adapter's name.

    Raises:
        ValueError: Keys do not have PEFT's prefix.
    """
    strays = {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    _raise_if_any([f"{key} {_problem(tensor, None)}" for key, tensor in strays.items()], adapter_name)
    renamed = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, live in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{name}.{saved}" in renamed:
                    renamed[f"{name}.{live}"] = renamed.pop(f"{name}.{saved}")
    return renamed


@contextmanager
def restored_on_failure(tuner: Any, adapter_name: str, modified: Collection[torch.Tensor] = ()) -> Iterator[None]:
    """Context manager for an injection. If it fails, restores the model: modules, hooks, weights, `requires_grad` and
    configurations. Steering adapters that were there before do not change, and need not be restored.

    Args:
        tuner ([`~peft.tuners.tuners_utils.BaseTuner`]): The tuner that injects an adapter.
        adapter_name (`str`): The name of the adapter.
        modified (`Collection[torch.Tensor]`): Weights of the base model that the injection changes in place.
    """
    model = tuner.model
    attributes = [_AttributeSnapshot(owner) for owner in (*model.modules(), tuner, tuner.peft_config[adapter_name])]
    flags = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in modified]
    configs = {id(config): config for config in (getattr(model, "config", None), text_config(model)) if config}
    depths = [
        (config, config.num_hidden_layers) for config in configs.values() if hasattr(config, "num_hidden_layers")
    ]
    try:
        yield
    except BaseException:
        for owned in attributes:
            owned.restore()
        for parameter, requires_grad, data in flags:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for tensor, value in values:
            tensor.data.copy_(value)
        for config, depth in depths:
            config.num_hidden_layers = depth
        if model.__dict__.get("peft_config") is tuner.peft_config:  # the adapter was added to a model with adapters
            tuner.peft_config.pop(adapter_name, None)
        raise


class _AttributeSnapshot:
    """The attributes of an object, and the contents of those that are collections, which include a module's children,
    parameters and hooks, and the attributes of PEFT's layers."""

    def __init__(self, owner: Any):
        self.owner, self.values = owner, dict(vars(owner))
        self.contents = [(value, type(value)(value)) for value in self.values.values() if type(value) in _COLLECTIONS]

    def restore(self) -> None:
        attributes = vars(self.owner)
        attributes.clear()
        attributes.update(self.values)
        for collection, content in self.contents:
            collection.clear()
            (collection.extend if isinstance(collection, list) else collection.update)(content)


def keep_until_dispatched(model: Any, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keeps a reference to an adapter's weights if the model has offloaded weights, because PEFT dispatches such a
    model again after loading. See [`SteeringLayer.move_to_execution_device`]."""
    if not isinstance(model, PeftModel) or not {"cpu", "disk"} & set(
        (getattr(model, "hf_device_map", None) or {}).values()
    ):
        return
    tuner: Any = model.base_model
    tuner.loaded_weights[adapter_name] = {
        f"{PREFIX}{name}": {
            leaf: tensors[f"{PREFIX}{name}.{layer.adapter_layer_names[0]}.{adapter_name}.{leaf}"]
            for leaf, _ in layer.adapters[adapter_name].named_parameters()
        }
        for name, layer in tuner.named_steering_layers()
        if adapter_name in layer.adapters
    }


def _missing(file_key: str, parameter: torch.Tensor) -> str:
    return f"{file_key} is missing, expected shape {tuple(parameter.shape)}"


def _problem(tensor: torch.Tensor, place: torch.Tensor | None) -> str | None:
    shape = tuple(tensor.shape)
    if place is None:
        return f"is unexpected (shape {shape})"
    if shape != tuple(place.shape):
        return f"has shape {shape}, expected {tuple(place.shape)}"
    if place.is_floating_point() and not tensor.is_floating_point():
        return f"has dtype {tensor.dtype}, expected floating point"
    # In the model's dtype, since a value that is finite in float32 can be infinite in float16.
    if not tensor.is_meta and not torch.isfinite(tensor.to(place.dtype)).all():
        return f"has NaN or infinite values in {str(place.dtype).removeprefix('torch.')}"
    return None


def _raise_if_any(problems: list[str], adapter_name: str) -> None:
    if problems:
        raise ValueError(
            f"The weights of adapter {adapter_name!r} do not match the model, so nothing was loaded:\n- "
            + listed(problems)
            + "\nCheck that the adapter was trained on this base model and that its folder is complete."
        )


def _file_key(key: str, adapter_name: str) -> str:
    """The key in the file, which has PEFT's prefix even if the model is not wrapped in a `PeftModel`."""
    bare = key.removeprefix(PREFIX).replace(f".modules_to_save.{adapter_name}.", ".")
    return PREFIX + _without_adapter_name(bare, adapter_name)


def _without_adapter_name(key: str, adapter_name: str) -> str:
    head, separator, leaf = key.rpartition(f".{adapter_name}.")
    return f"{head}.{leaf}" if separator else key.removesuffix(f".{adapter_name}")


def _saved_embeddings(model: nn.Module, state: dict, adapter_name: str, tensors: Mapping) -> dict[str, torch.Tensor]:
    """The parameters of embeddings that a file may contain. PEFT saves an embedding that has an adapter, and both the
    input and the output embeddings if the vocabulary was resized. The keys of an embedding that PEFT has wrapped may
    or may not contain the adapter's name."""
    embeddings = _embeddings(model)
    own: dict[str, torch.Tensor] = {}
    groups: list[dict[str, torch.Tensor]] = []
    for name, module in model.named_modules():
        if module in embeddings:
            group = {key: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            group |= {_without_adapter_name(key, adapter_name): tensor for key, tensor in group.items()}
            groups.append(group)
            if isinstance(module, BaseTunerLayer):
                own |= group
    if not all(group.keys() & tensors.keys() for group in groups):
        return own
    return {key: tensor for group in groups for key, tensor in group.items()}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for module in (getter() for getter in getters if getter) if module is not None]
