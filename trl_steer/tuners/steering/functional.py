"""Functions on the steering adapters of a model, either a `PeftModel` or a model with injected adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from .adapter import SCALING_STACK, ScopedScaling, SteeringAdapter
from .config import check_number
from .folder import AdapterFolder
from .layer import SteeringLayer
from .loading import check_base_model_type
from .matching import modules_outside_adapters

_LOCK = threading.Lock()


def set_scaling(model: nn.Module, adapter_name: str, value: float) -> None:
    """
    Sets the scaling of an adapter: `h + scaling * update(h)`. The new value is saved with the adapter.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        adapter_name (`str`): The name of the adapter.
        value (`float`):
            The new scaling, any finite number. 0 switches the steering update off (other parts of the adapter stay
            active), 1 is the update as trained, a negative number reverses it.

    Raises:
        ValueError: There is no such adapter, it is merged, or `value` is not finite.
        TypeError: `value` is not a number.
    """
    adapters = _adapters_to_scale(model, adapter_name, value)
    for adapter in adapters:
        adapter.scaling = float(value)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        _tuner_class(config).update_steering_config(config, scaling=float(value))


@contextmanager
def adapter_scaling(model: nn.Module, adapter_name: str, value: float) -> Iterator[None]:
    """
    Context manager that sets the scaling of an adapter for the current thread or asyncio task, see [`set_scaling`].

    Contexts may overlap and end in any order. The adapter's own scaling, which is what is saved, does not change.
    Meant for inference: with gradient checkpointing on a GPU, the backward pass recomputes blocks in another thread,
    which uses the adapter's own scaling.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        adapter_name (`str`): The name of the adapter.
        value (`float`): The scaling inside the context, any finite number.

    Raises:
        ValueError: There is no such adapter, it is merged, or `value` is not finite.
        TypeError: `value` is not a number.

    Example:

        ```py
        >>> with adapter_scaling(model, "default", 0.5):
        ...     model.generate(**inputs)
        ```
    """
    adapters = _adapters_to_scale(model, adapter_name, value)
    entry = SCALING_STACK.push(ScopedScaling(frozenset(adapters), float(value)))
    _count_contexts(adapters, 1)
    try:
        yield
    finally:
        _count_contexts(adapters, -1)
        SCALING_STACK.remove(entry)


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """
    Replaces the weights of a loaded adapter with those of another folder, in place, so that compiled code stays valid.
    Also resets the adapter's scaling and dropout to those of the folder. An enclosing [`adapter_scaling`] context
    keeps its scaling until it ends.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        model_name_or_path (`str` or `Path`): Adapter folder or Hub id.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter to replace.
        torch_device (`str`, *optional*): The device to read the weights onto. Default: that of the adapter.
        kwargs: Options for the download of the folder (`subfolder`, `revision`, `token`, ...).

    Raises:
        ValueError:
            There is no such adapter; it is merged or offloaded; or the folder has no adapter that can replace it: of
            the same type, rank, activation, site and blocks, for the same type of model, with valid weights. The
            adapter is left unchanged.
    """
    adapters = _adapters(model, adapter_name)
    current = model.peft_config[adapter_name]
    if _is_merged(model, adapter_name):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` before replacing it.")
    if any(adapter.is_offloaded() for adapter in adapters):
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be replaced, because its weights are offloaded. Load the model without "
            "offloading."
        )
    tuner_class = _tuner_class(current)
    try:
        folder = AdapterFolder.open(model_name_or_path, **kwargs)
        new, tensors = folder.config, folder.tensors()
        _check_same_structure(tuner_class, current, new)
        check_base_model_type(new, model, tuner_class.steering_config(new).base_model_type)
        tuner_class.check_tensors(model, current, adapter_name, tensors)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"Adapter {adapter_name!r} cannot be replaced by {model_name_or_path}: {error}") from error
    device = torch_device or next(adapters[0].parameters()).device
    set_peft_model_state_dict(model, {key: tensor.to(device) for key, tensor in tensors.items()}, adapter_name)
    steering = tuner_class.steering_config(new)
    settings = {field: getattr(steering, field) for field in adapters[0].setting_fields}
    for adapter in adapters:
        vars(adapter).update(settings)
    tuner_class.update_steering_config(current, **settings)
    set_scaling(model, adapter_name, steering.scaling)


def _check_same_structure(tuner_class: Any, current: Any, new: Any) -> None:
    if current.peft_type != new.peft_type:
        raise ValueError(f"its peft_type is {new.peft_type}, but the loaded adapter has {current.peft_type}.")
    theirs = tuner_class.structure(new)
    for field, ours in tuner_class.structure(current).items():
        if ours != theirs.get(field):
            raise ValueError(
                f"its {field} is {theirs.get(field)!r}, but the loaded adapter has {ours!r}. Load it as another "
                "adapter with `load_adapter` instead."
            )


def _adapters_to_scale(model: nn.Module, adapter_name: str, value: float) -> list[SteeringAdapter]:
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
    return [module for _, module in modules_outside_adapters(model) if isinstance(module, SteeringLayer)]


def _is_merged(model: nn.Module, adapter_name: str) -> bool:
    return any(adapter_name in layer.merged_adapters for layer in _layers(model))


def _adapters(model: nn.Module, adapter_name: str) -> list[SteeringAdapter]:
    layers = _layers(model)
    adapters = [layer.adapters[adapter_name] for layer in layers if adapter_name in layer.adapters]
    if not adapters:
        known = sorted({name for layer in layers for name in layer.adapters})
        raise ValueError(f"There is no steering adapter {adapter_name!r} in this model, which has {known}.")
    return adapters
