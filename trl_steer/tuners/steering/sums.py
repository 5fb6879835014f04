"""Exact weighted sums of adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .config import check_number
from .layer import SteeringLayer


def check_summable(tuner: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Checks that adapters of a tuner have an exact sum.

    Raises:
        ValueError: They do not, or an adapter does not exist, or the new one already does, or a weight is not finite.
        TypeError: A weight is not a number.
    """
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is already an adapter {adapter_name!r}. Choose another name, or delete it first.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"Expected one weight for each adapter, got {len(adapters)} adapters, {len(weights)} weights."
        )
    for index, weight in enumerate(weights):
        check_number(f"weights[{index}]", weight)
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"There is no adapter {name!r}; the model has {list(tuner.peft_config)}.")
    layers = [layer for _, layer in tuner.named_steering_layers()]
    if any(layer.adapters[name].is_offloaded() for layer in layers for name in adapters if name in layer.adapters):
        raise ValueError(
            f"Adapters {adapters} cannot be summed, because weights are offloaded. Load the model without offloading."
        )
    configs = {name: tuner.steering_config(tuner.peft_config[name]) for name in adapters}
    for config in configs.values():
        for field in ("site", "positions", *tuner.steering_layer_cls.adapter_class(config).structural_fields):
            values = {name: getattr(other, field, None) for name, other in configs.items()}
            if len(set(values.values())) > 1:
                raise ValueError(
                    f"Adapters with different {field} have no exact sum: {values}. Use adapters with the same "
                    f"{field}, or activate them together."
                )
    if any(tuner.peft_config[n].modules_to_save or tuner.peft_config[n].trainable_token_indices for n in adapters):
        raise ValueError(
            "add_weighted_adapter is not supported for adapters with `modules_to_save` or `trainable_token_indices`."
        )


def summed_config(tuner: Any, adapters: list[str]) -> Any:
    """The steering part of the configuration of the sum of adapters."""
    configs = [tuner.steering_config(tuner.peft_config[name]) for name in adapters]
    config = copy.deepcopy(configs[0])
    config.scaling = 1.0
    for field, value in tuner.steering_layer_cls.adapter_class(config).summed_fields(configs).items():
        setattr(config, field, value)
    config.target_modules = set(_summands(tuner, adapters))
    config.exclude_modules = config.layers_to_transform = config.init_from = None
    return config


@torch.no_grad()
def write_sums(tuner: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Sets an adapter, already injected into all blocks of the others, to the weighted sum of the others."""
    for layer in _summands(tuner, adapters).values():
        parts = [
            (weight * layer.adapters[name].scaling, layer.adapters[name])
            for name, weight in zip(adapters, weights, strict=True)
            if name in layer.adapters
        ]
        layer.adapters[adapter_name].write_sum(parts)
    tuner._cast_adapter_dtype(adapter_name)


def _summands(tuner: Any, adapters: list[str]) -> dict[str, SteeringLayer]:
    """The name and the steering layer of each block with one of the adapters."""
    return {
        name.rpartition(".")[0]: layer
        for name, layer in tuner.named_steering_layers()
        if set(adapters) & set(layer.adapters)
    }
