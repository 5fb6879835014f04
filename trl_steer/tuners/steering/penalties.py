"""The penalties of adapters: what training adds to the loss, for methods that have one."""

from __future__ import annotations

import torch
from torch import nn

from .adapter import SteeringAdapter, TrainingProgress
from .layer import SteeringLayer


def adapter_penalty(model: nn.Module, step: int = 0, max_steps: int = 1) -> torch.Tensor | None:
    """
    The sum of the penalties of the active adapters that are trained.

    Args:
        model (`nn.Module`): A `PeftModel`, or a model with injected adapters.
        step (`int`, defaults to `0`): Optimizer steps that were made.
        max_steps (`int`, defaults to `1`): Optimizer steps of the whole training.

    Returns:
        `torch.Tensor`, *optional*: A scalar, `None` if no such adapter has a penalty.
    """
    adapters: dict[tuple[str, str], list[SteeringAdapter]] = {}
    for layer in model.modules():
        if not isinstance(layer, SteeringLayer):
            continue
        for name, adapter in layer.adapters.items():
            if name in layer.active_adapters and any(parameter.requires_grad for parameter in adapter.parameters()):
                adapters.setdefault((layer.layer_name, name), []).append(adapter)
    terms = [
        adapter.penalty(TrainingProgress(step, max_steps, len(together)))
        for together in adapters.values()
        for adapter in together
    ]
    total: torch.Tensor | None = None
    for term in terms:
        if term is not None:  # blocks may be on different devices
            total = term if total is None else total + term.to(total.device)
    return total
