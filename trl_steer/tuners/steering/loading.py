"""Checks on an adapter that is loaded, before anything of it stays in the model.

PEFT hands a tuner no folder: it asks for an injection first, then reads the weights, and then asks for their keys. So
everything is checked at the injection, against the folder that PEFT or transformers is loading at that moment, and one
place, [`restored_on_failure`], leaves the model as it was, whatever fails.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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

from .folder import PREFIX, AdapterFolder
from .matching import text_config
from .saving import auxiliary_keys

# Functions that inject an adapter and load its weights afterwards: their module and name, and the local variable that
# holds the folder or Hub id.
_LOADERS = {
    ("peft.peft_model", "from_pretrained"): "model_id",
    ("peft.peft_model", "load_adapter"): "model_id",
    ("peft.mixed_model", "from_pretrained"): "model_id",
    ("transformers.integrations.peft", "load_adapter"): "peft_model_id",
}

_COLLECTIONS = (dict, OrderedDict, list, set)


@dataclass
class Load:
    """
    The load that an injection is part of.

    Attributes:
        folder ([`AdapterFolder`]): Where the weights are going to be read from.
        key_mapping (`dict[str, str]`): Regular expressions that PEFT is going to apply to the keys.
        by_transformers (`bool`): Whether transformers is going to read the weights, and not PEFT.
    """

    folder: AdapterFolder
    key_mapping: Mapping[str, str]
    by_transformers: bool

    @classmethod
    def in_progress(cls) -> Load | None:
        """The load whose injection is running right now, told from the functions that have been called. `None` for a
        new adapter, also if its configuration was read from a folder.

        Raises:
            ValueError: The folder has no weights that can be read.
        """
        frame: Any = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            variable = _LOADERS.get((module, frame.f_code.co_name))
            values = frame.f_locals
            if variable is not None and values.get(variable) is not None:
                if values.get("adapter_state_dict") is not None:
                    return None  # transformers can be given the tensors themselves
                load_config = values.get("load_config")
                kwargs = {
                    **PeftModel._split_kwargs(values.get("kwargs") or {})[0],
                    **(values.get("hf_hub_download_kwargs") or {}),
                    **(getattr(load_config, "download_kwargs", None) or {}),
                }
                device = {**(values.get("kwargs") or {}), **values}.get("torch_device")
                if device is not None:
                    torch.empty(0, device=device)  # raises what PEFT would, but in time
                if getattr(load_config, "use_safetensors", None) is False:
                    raise ValueError("Weights are read as safetensors only; leave out `use_safetensors=False`.")
                folder = AdapterFolder.open(values[variable], **kwargs)
                return cls(folder, values.get("key_mapping") or {}, module.startswith("transformers."))
            frame = frame.f_back
        return None

    @cached_property
    def header(self) -> dict[str, torch.Tensor]:
        """All tensors of the file as empty ones, under the keys that PEFT makes of those of the file."""
        return self._renamed(self.folder.header())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file under the same keys."""
        return self._renamed(self.folder.tensors())

    def _renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self._renamed_key(key): tensor for key, tensor in tensors.items()}

    def _renamed_key(self, key: str) -> str:
        bare = key.removeprefix(PREFIX)
        for pattern, replacement in self.key_mapping.items():
            new, count = re.subn(pattern, replacement, bare)
            if count:
                return PREFIX + new
        return key


def check_base_model_type(config: Any, model: nn.Module, theirs: str | None) -> None:
    """Makes sure that an adapter read from a folder is for this type of model, if both say what they are.

    Args:
        config ([`~peft.PeftConfig`]): The adapter's configuration.
        model (`nn.Module`): The model to load it into.
        theirs (`str`, *optional*): The `base_model_type` of the adapter.

    Raises:
        ValueError: They are of different types.
    """
    ours = getattr(text_config(model), "model_type", None)
    if theirs and ours and theirs != ours:
        name = f", {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
        raise ValueError(
            f"This adapter was trained on a model of type {theirs!r}, and the base model is of type {ours!r}, whose "
            f"hidden states mean something else, even if the shapes fit. Load the one that it was trained on{name}. "
            "If you know that it fits this one too, set base_model_type to null in its adapter_config.json."
        )


def check_header(adapter_name: str, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Makes sure that a file holds the expected tensors and no others, by their shapes and dtypes.

    Raises:
        ValueError: Tensors are missing, unknown, of another shape or not floating point. Each is named.
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
) -> None:
    """Makes sure that `tensors` is this adapter, whole and finite, and nothing that would overwrite the base model.

    PEFT itself only warns of what is missing, and loads what is extra.

    Args:
        model (`nn.Module`): Model with the adapter in place.
        adapter_name (`str`): The adapter that is about to be loaded.
        tensors (`dict[str, torch.Tensor]`): What was read, under keys of `model.state_dict()`.
        read (`Mapping[str, torch.Tensor]`): The same under the keys of the file.
        biases (`Collection[str]`): Keys of biases of the base model that were trained with the adapter.

    Raises:
        ValueError: Tensors are missing, unknown, of another shape, not floating point, or not finite. Each is named.
    """
    state = model.state_dict()
    required = _filter_state_dict_by_key_prefixes(state, _get_tuner_state_dict_key_prefixes(model, adapter_name))
    for key in biases:
        prefixed = f"{PREFIX}{key}"  # in a file also where the model has no `PeftModel` around it
        required[prefixed if prefixed in tensors else key] = state[key]
    auxiliary = {key: state[key] for key in auxiliary_keys(model, adapter_name) if key in state}
    required |= auxiliary
    places = {**_saved_embeddings(model, state, adapter_name, tensors), **required}
    problems = [
        _missing(_file_key(key, adapter_name), parameter) for key, parameter in required.items() if key not in tensors
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
    _raise_if_any(problems, adapter_name)


def model_keys(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file under the keys that they have without a `PeftModel` around the model, those of modules that
    are trained in full and of trained tokens with the adapter's name, as PEFT does before it asks a tuner.

    Raises:
        ValueError: Keys have no prefix, and would get one from no one.
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
def restored_on_failure(tuner: Any, adapter_name: str, rewritten: Collection[torch.Tensor] = ()) -> Iterator[None]:
    """Leaves the model as it was before a block that fails: modules, hooks, weights, flags and configurations.

    Args:
        tuner ([`~peft.tuners.tuners_utils.BaseTuner`]): The tuner that is about to inject an adapter.
        adapter_name (`str`): The adapter.
        rewritten (`Collection[torch.Tensor]`): Weights of the base model that the injection changes, to be kept.
    """
    model = tuner.model
    attributes = [_Attributes(owner) for owner in (*model.modules(), tuner, tuner.peft_config[adapter_name])]
    flags = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in rewritten]
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
        if model.__dict__.get("peft_config") is tuner.peft_config:  # of an adapter that is added to others
            tuner.peft_config.pop(adapter_name, None)
        raise


class _Attributes:
    """The attributes of an object, with what is in those that are collections: a module's children, parameters and
    hooks are, and so is all that PEFT's layers know of their adapters."""

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
    """Lets the tuner hold on to an adapter's weights where PEFT is going to dispatch a model with offloaded weights
    once more after loading them. See [`SteeringLayer.move_to_execution_device`]."""
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
    return f"{file_key} is missing, the model expects shape {tuple(parameter.shape)}"


def _problem(tensor: torch.Tensor, place: torch.Tensor | None) -> str | None:
    shape = tuple(tensor.shape)
    if place is None:
        return f"has shape {shape} but no place in this adapter"
    if shape != tuple(place.shape):
        return f"has shape {shape}, the model expects {tuple(place.shape)}"
    if place.is_floating_point() and not tensor.is_floating_point():
        return f"has dtype {tensor.dtype}, floating point is expected"
    # As the model will have it: a value that is finite in float32 need not be in float16.
    if not tensor.is_meta and not torch.isfinite(tensor.to(place.dtype)).all():
        return f"holds NaN or infinite values in {str(place.dtype).removeprefix('torch.')}"
    return None


def _raise_if_any(problems: list[str], adapter_name: str) -> None:
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError(
            f"The weights of adapter {adapter_name!r} do not fit, so nothing was loaded:\n- "
            + "\n- ".join(shown)
            + "\nCheck that the adapter was trained on this base model and that its folder is complete."
        )


def _file_key(key: str, adapter_name: str) -> str:
    """The name of the tensor in the file, which has a prefix whether or not the model has a `PeftModel` around it."""
    bare = key.removeprefix(PREFIX).replace(f".modules_to_save.{adapter_name}.", ".")
    return PREFIX + _without_name(bare, adapter_name)


def _without_name(key: str, adapter_name: str) -> str:
    head, separator, leaf = key.rpartition(f".{adapter_name}.")
    return f"{head}.{leaf}" if separator else key.removesuffix(f".{adapter_name}")


def _saved_embeddings(model: nn.Module, state: dict, adapter_name: str, tensors: Mapping) -> dict[str, torch.Tensor]:
    """Where embeddings in a file may go. PEFT saves those of a resized vocabulary, always input and output together
    (one of them alone is a stray), and with all that it has put around them, with and without the adapter's name. One
    that an adapter targets itself is saved alone."""
    embeddings = _embeddings(model)
    groups: list[dict[str, torch.Tensor]] = []
    targeted: list[dict[str, torch.Tensor]] = []
    for name, module in model.named_modules():
        if module in embeddings:
            group = {key: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            group |= {_without_name(key, adapter_name): tensor for key, tensor in group.items()}
            groups.append(group)
            if isinstance(module, BaseTunerLayer):
                targeted.append(group)
    together = all(group.keys() & tensors.keys() for group in groups)
    return {key: tensor for group in (groups if together else targeted) for key, tensor in group.items()}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for module in (getter() for getter in getters if getter) if module is not None]
