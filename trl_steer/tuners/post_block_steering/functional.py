"""What can be done to the steering adapters of any model, whether a `PeftModel` or one with injected adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from .layer import PostBlockSteeringLayer, SteeringAdapter
from .loading import check_base_model_type

# What the LoRA half of a joint adapter computes is decided by these. PEFT's hot swap asks for equal dropout as well.
_LORA_FORM = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_dropout", "lora_bias", "bias", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "qalora_group_size", "use_bdlora", "kasa_config", "arrow_config"),
]
# Ways to initialize LoRA that also change the weights of the base model.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    adapters = _adapters(model, adapter_name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"scaling must be a number, got {value!r} of type {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"scaling must be finite, got {value}.")
    if any(adapter_name in layer.merged_adapters for layer in _layers(model)):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` before setting its scaling.")
    for adapter in adapters:
        adapter.scaling = float(value)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None:
        config.scaling = float(value)


@contextmanager
def adapter_scaling(model: nn.Module, adapter_name: str, value: float) -> Iterator[None]:
    """
    Sets the strength of an adapter for a `with` block. See [`set_scaling`].

    Example:

        ```py
        >>> with adapter_scaling(model, "default", 0.5):
        ...     model.generate(**inputs)
        ```
    """
    before = _adapters(model, adapter_name)[0].scaling
    set_scaling(model, adapter_name, value)
    try:
        yield
    finally:
        set_scaling(model, adapter_name, before)


def hotswap_adapter(model: Any, path: str | Path, adapter_name: str = "default", **kwargs) -> None:
    """
    Replaces the weights of a loaded adapter by those of another folder, in place, so compiled code stays valid.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        path (`str` or `Path`): Adapter folder or Hub id.
        adapter_name (`str`, defaults to `"default"`): The adapter to replace.
        kwargs: Passed on to PEFT's download of the folder (`revision`, `token`, ...).

    Raises:
        ValueError:
            There is no such adapter, it is merged or offloaded, or the other one has another form, rank, activation or
            set of blocks (of a joint adapter also other settings of LoRA), is for another type of model, or has broken
            weights. Nothing has changed then.
    """
    adapters = _adapters(model, adapter_name)
    current = model.peft_config[adapter_name]
    new: Any = PeftConfig.from_pretrained(str(path), **kwargs)
    form = _form(new)
    for field, ours in _form(current).items():
        if ours != form.get(field):
            raise ValueError(
                f"{path} cannot replace adapter {adapter_name!r}: its {field} is {form.get(field)!r} and {ours!r} is "
                "loaded. Load it as a further adapter with `load_adapter` instead."
            )
    check_base_model_type(new, model)
    if any(adapter_name in layer.merged_adapters for layer in _layers(model)):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call `unmerge_adapter()` before replacing it.")
    device = next(adapters[0].parameters()).device
    if device.type == "meta":
        raise ValueError(f"Adapter {adapter_name!r} is offloaded, where its weights cannot be replaced.")
    for adapter in adapters:
        adapter.awaits_weights = False
    set_peft_model_state_dict(model, load_peft_weights(str(path), device=str(device), **kwargs), adapter_name)
    for adapter in adapters:
        if hasattr(adapter, "dropout"):
            adapter.dropout = new.dropout
    current.dropout = new.dropout
    set_scaling(model, adapter_name, new.scaling)


def _form(config: Any) -> dict[str, Any]:
    """Fields that decide what the modules of a loaded adapter compute, apart from their weights."""
    joint = hasattr(config, "steering_config")
    steering = config.steering_config() if joint else config
    whole = ["peft_type", "modules_to_save", "trainable_token_indices", *(_LORA_FORM if joint else [])]
    part = ["steering_type", "r", "activation"]
    if getattr(steering, "steering_type", None) == "vector":
        part.remove("r")
    form = {name: getattr(config, name, None) for name in whole}
    if joint:
        init = str(config.init_lora_weights).lower()
        form["init_lora_weights"] = init if init.startswith(_REWRITES_BASE) else None
    form |= {f"steering.{name}" if joint else name: getattr(steering, name, None) for name in part}
    return {name: _plain(value) for name, value in form.items()}


def _plain(value: Any) -> Any:
    """PEFT turns lists of names into sets here and there, which says nothing new."""
    return sorted(value) if isinstance(value, (list, tuple, set)) else value


def _layers(model: nn.Module) -> list[PostBlockSteeringLayer]:
    return [module for module in model.modules() if isinstance(module, PostBlockSteeringLayer)]


def _adapters(model: nn.Module, adapter_name: str) -> list[SteeringAdapter]:
    layers = _layers(model)
    adapters: list[Any] = [layer.adapters[adapter_name] for layer in layers if adapter_name in layer.adapters]
    if not adapters:
        known = sorted({name for layer in layers for name in layer.adapters})
        raise ValueError(f"There is no steering adapter {adapter_name!r} in this model; it has {known}.")
    return adapters
