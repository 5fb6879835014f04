"""The weights of a new adapter from the folder of another one: `init_from` in a steering configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from .card import public_id
from .folder import PREFIX, AdapterFolder
from .loading import check_base_model_type, check_header


@torch.no_grad()
def write_initial_weights(tuner: Any, adapter_name: str) -> None:
    """
    Sets the steering weights of a new adapter, already injected, to those in the folder `init_from`, which has an
    adapter of the steering part's own type.

    Raises:
        ValueError: The folder has no adapter with the same type, base model, structure and blocks, or its weights are
            not valid. The message names the difference.
    """
    config = tuner.peft_config[adapter_name]
    steering = tuner.steering_config(config)
    folder = AdapterFolder.open(steering.init_from)
    found = folder.config
    try:
        _check_config(tuner, config, steering, found)
        _write(tuner, adapter_name, found, folder.tensors())
    except ValueError as error:
        raise ValueError(f"The adapter cannot start from init_from={steering.init_from!r}: {error}") from error


def _check_config(tuner: Any, config: Any, steering: Any, found: Any) -> None:
    if type(found) is not type(steering):
        raise ValueError(f"it has a {type(found).__name__}, expected a {type(steering).__name__}.")
    check_base_model_type(found, tuner.model, found.base_model_type)
    ours, theirs = config.base_model_name_or_path, found.base_model_name_or_path
    if _are_different(ours, theirs):
        raise ValueError(
            f"its base model is {theirs!r}, but this one is {ours!r}. Use a folder for the same base model."
        )
    adapter_class = tuner.steering_layer_cls.adapter_class(steering)
    for field in ("site", "positions", "scaling", *adapter_class.structural_fields, *adapter_class.size_fields):
        wanted, given = (getattr(config, field, None) for config in (steering, found))
        if wanted != given:
            raise ValueError(
                f"its {field} is {given!r}, but the new adapter has {wanted!r}. Set {field}={given!r} in the "
                "configuration, or use another folder."
            )


def _are_different(ours: str | None, theirs: str | None) -> bool:
    """Whether two names are those of different models: two Hub ids, or two folders that both exist."""
    if not ours or not theirs:
        return False
    if all(Path(name).is_dir() for name in (ours, theirs)):
        return Path(ours).resolve() != Path(theirs).resolve()
    ids = public_id(ours), public_id(theirs)
    return None not in ids and ids[0] != ids[1]


def _write(tuner: Any, adapter_name: str, found: Any, tensors: dict[str, torch.Tensor]) -> None:
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[found.peft_type]
    layer_cls = tuner_cls.steering_layer_cls
    leaf = layer_cls.adapter_layer_names[0]
    places = {
        f"{PREFIX}{name}.{leaf}.{tensor_name}": parameter
        for name, layer in tuner.named_steering_layers()
        if adapter_name in layer.adapters
        for tensor_name, parameter in layer.adapters[adapter_name].named_parameters()
    }
    given = {key: tensor for key, tensor in tensors.items() if f".{leaf}." in key}
    if any(parameter.is_meta for parameter in places.values()):
        raise ValueError("low_cpu_mem_usage=True creates empty weights, which are to be loaded. Leave it out.")
    check_header(adapter_name, places, given)  # and that values are finite, since these are not meta tensors
    adapter_class = layer_cls.adapter_class(found)
    for key, tensor in given.items():
        problem = adapter_class.find_problem(key.rpartition(".")[2], tensor)
        if problem:
            raise ValueError(f"{key} {problem}.")
    for key, parameter in places.items():
        parameter.copy_(given[key])
