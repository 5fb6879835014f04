"""What can be done to the steering adapters of any model, whether a `PeftModel` or one with injected adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from .adapter import STRENGTHS, SteeringAdapter, Strength
from .config import check_number
from .folder import AdapterFolder
from .layer import SteeringLayer
from .loading import check_base_model_type

_LOCK = threading.Lock()


def set_scaling(model: nn.Module, adapter_name: str, value: float) -> None:
    """
    Sets the strength of an adapter. Saved with the adapter from then on.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        adapter_name (`str`): The adapter.
        value (`float`): The new `scaling`. 0 is the base model, 1 what was trained, negative steers away.

    Raises:
        ValueError: There is no such adapter, it is merged, or `value` is not finite.
        TypeError: `value` is not a number.
    """
    adapters = _adapters_to_turn(model, adapter_name, value)
    for adapter in adapters:
        adapter.scaling = float(value)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        _tuner_class(config).update_steering_config(config, scaling=float(value))


@contextmanager
def adapter_scaling(model: nn.Module, adapter_name: str, value: float) -> Iterator[None]:
    """
    Sets the strength of an adapter for what a `with` block runs, see [`set_scaling`].

    Other threads and tasks are not affected, blocks may end in any order, and the adapter's own strength, which is
    what is saved, stays as it is. Made for inference: with gradient checkpointing on a GPU, a block that is computed
    again in the backward pass runs in another thread, with the adapter's own strength.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        adapter_name (`str`): The adapter.
        value (`float`): Its strength inside the block.

    Raises:
        ValueError: There is no such adapter, it is merged, or `value` is not finite.
        TypeError: `value` is not a number.

    Example:

        ```py
        >>> with adapter_scaling(model, "default", 0.5):
        ...     model.generate(**inputs)
        ```
    """
    adapters = _adapters_to_turn(model, adapter_name, value)
    entry = STRENGTHS.push(Strength(frozenset(adapters), float(value)))
    _count_contexts(adapters, 1)
    try:
        yield
    finally:
        _count_contexts(adapters, -1)
        STRENGTHS.remove(entry)


def hotswap_adapter(model: Any, path: str | Path, adapter_name: str = "default", **kwargs) -> None:
    """
    Replaces the weights of a loaded adapter by those of another folder, in place, so compiled code stays valid. The
    strength becomes that of the folder; an [`adapter_scaling`] block around this goes on until it ends.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        path (`str` or `Path`): Adapter folder or Hub id.
        adapter_name (`str`, defaults to `"default"`): The adapter to replace.
        kwargs: Passed on to the download of the folder (`subfolder`, `revision`, `token`, ...).

    Raises:
        ValueError:
            There is no such adapter, it is merged or offloaded, or the folder holds no adapter, one of another form,
            rank, activation, site or set of blocks, one for another type of model, or broken weights. The message
            names the folder, and nothing has changed then.
    """
    adapters = _adapters(model, adapter_name)
    current = model.peft_config[adapter_name]
    if _is_merged(model, adapter_name):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` before replacing it.")
    if any(adapter.is_offloaded() for adapter in adapters):
        raise ValueError(f"Adapter {adapter_name!r} is offloaded, where its weights cannot be replaced.")
    tuner_class = _tuner_class(current)
    try:
        folder = AdapterFolder.open(path, **kwargs)
        new, tensors = folder.config, folder.tensors()
        _check_same_structure(tuner_class, current, new)
        check_base_model_type(new, model, tuner_class.steering_config(new).base_model_type)
        tuner_class.check_tensors(model, current, adapter_name, tensors)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} cannot replace adapter {adapter_name!r}: {error}") from error
    device = next(adapters[0].parameters()).device
    set_peft_model_state_dict(model, {key: tensor.to(device) for key, tensor in tensors.items()}, adapter_name)
    steering = tuner_class.steering_config(new)
    settings = {field: getattr(steering, field) for field in adapters[0].setting_fields}
    for adapter in adapters:
        vars(adapter).update(settings)
    tuner_class.update_steering_config(current, **settings)
    set_scaling(model, adapter_name, steering.scaling)


def _check_same_structure(tuner_class: Any, current: Any, new: Any) -> None:
    if current.peft_type != new.peft_type:
        raise ValueError(f"Its peft_type is {new.peft_type} and {current.peft_type} is loaded.")
    theirs = tuner_class.structure(new)
    for field, ours in tuner_class.structure(current).items():
        if ours != theirs.get(field):
            raise ValueError(
                f"its {field} is {theirs.get(field)!r} and {ours!r} is loaded. Load it as a further adapter with "
                "`load_adapter` instead."
            )


def _adapters_to_turn(model: nn.Module, adapter_name: str, value: float) -> list[SteeringAdapter]:
    adapters = _adapters(model, adapter_name)
    check_number("scaling", value)
    if _is_merged(model, adapter_name):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` before setting its scaling.")
    return adapters


def _count_contexts(adapters: list[SteeringAdapter], by: int) -> None:
    with _LOCK:
        for adapter in adapters:
            adapter.contexts += by


def _tuner_class(config: Any) -> Any:
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def _layers(model: nn.Module) -> list[SteeringLayer]:
    return [module for module in model.modules() if isinstance(module, SteeringLayer)]


def _is_merged(model: nn.Module, adapter_name: str) -> bool:
    return any(adapter_name in layer.merged_adapters for layer in _layers(model))


def _adapters(model: nn.Module, adapter_name: str) -> list[SteeringAdapter]:
    layers = _layers(model)
    adapters = [layer.adapters[adapter_name] for layer in layers if adapter_name in layer.adapters]
    if not adapters:
        known = sorted({name for layer in layers for name in layer.adapters})
        raise ValueError(f"There is no steering adapter {adapter_name!r} in this model; it has {known}.")
    return adapters
