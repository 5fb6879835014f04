"""The active adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from ..tuners.steering.functional import adapter_scaling
from ..tuners.steering.layer import SteeringLayer
from .states import Block


def steering_at(block: Block, site: str) -> list[tuple[Any, str]]:
    """The steering layers with an active adapter at a site of a block, and the names of these adapters.

    Raises:
        ValueError: One of them is merged.
    """
    found = [
        (layer, name)
        for layer in block.module.children()
        if isinstance(layer, SteeringLayer) and not layer.disable_adapters
        for name in layer.active_adapters
        if name in layer.adapters and layer.adapters[name].site == site
    ]
    check_not_merged([layer for layer, _ in found])
    return found


def lora_outside_attention(block: Block) -> dict[str, Any]:
    """The layers with active LoRA in a block, by name, except those of the attention.

    Raises:
        ValueError: One of them is merged.
    """
    found: dict[str, Any] = {
        name: module
        for name, module in block.module.named_modules()
        if isinstance(module, LoraLayer) and not block.anatomy.is_in_attention(name)
    }
    check_not_merged(list(found.values()))
    return {
        name: layer
        for name, layer in found.items()
        if not layer.disable_adapters and any(adapter in layer.scaling for adapter in layer.active_adapters)
    }


def check_not_merged(layers: list[Any]) -> None:
    """
    Raises:
        ValueError: An adapter is merged.
    """
    if any(layer.merged for layer in layers):
        raise ValueError("The adapter is merged. Call `unmerge_adapter()` first.")


@contextmanager
def scaled(model: Any, factor: float) -> Iterator[None]:
    """
    Context manager that multiplies the update of the active adapters by a factor. In a joint adapter, both halves.

    Args:
        model (`PeftModel`): A model with an active adapter, ours or LoRA.
        factor (`float`): The factor. 1 is the adapter as it is, 0 switches it off.

    Raises:
        ValueError: The adapter cannot be scaled.
    """
    with ExitStack() as stack:
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            # The steering half of a joint adapter follows LoRA.
            stack.enter_context(rescale_adapter_scale(model, float(factor)))
        else:
            for name in model.active_adapters:
                stack.enter_context(adapter_scaling(model, name, factor * _own_scaling(model, name)))
        yield


def _own_scaling(model: Any, name: str) -> float:
    layers = [module for module in model.modules() if isinstance(module, SteeringLayer) and name in module.adapters]
    if not layers:
        kind = model.peft_config[name].peft_type
        raise ValueError(f"Adapter {name!r} of type {kind} cannot be scaled. Use one of ours or LoRA.")
    return layers[0].adapters[name].scaling
