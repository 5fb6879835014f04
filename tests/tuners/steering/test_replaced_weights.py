"""Adapters read their weights as attributes, so pruning and parametrizations may stand behind them."""

from __future__ import annotations

import copy

import torch
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel
from steering_cases import adapters_of, logits, steer
from torch import nn
from torch.nn.utils import parametrize, prune
from tuner_cases import over_rows_on


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def weights(model):
    """All weights of steering adapters that may have any value: the adapter, and the name of the weight in it."""
    named = [(adapter, name) for adapter in adapters_of(model) for name, _ in list(adapter.named_parameters())]
    return [(adapter, name) for adapter, name in named if name != "rotation"]  # LoReFT's has orthonormal rows


def reference(model, change):
    """A copy of the model with weights changed in place."""
    reference = copy.deepcopy(model)
    for adapter, name in weights(reference):
        parameter = getattr(adapter, name)
        parameter.data.copy_(change(parameter.data))
    return reference


def loss_of(model):
    inputs = tiny_inputs()
    return model(**inputs, labels=inputs["input_ids"]).loss


@over_rows_on("llama", "gpt2")
def test_pruned_adapters_run_train_and_are_saved(row, family, tmp_path):
    model = steer(tiny_model(family), row)

    def largest_half(weight):
        size = weight.abs().flatten()
        return weight * (weight.abs() > size.kthvalue(round(0.5 * size.numel())).values)

    pruned = reference(model, largest_half)
    assert not torch.allclose(logits(pruned), logits(model), atol=1e-3)
    for adapter, name in weights(model):
        prune.l1_unstructured(adapter, name, amount=0.5)
    assert torch.equal(logits(model), logits(pruned))
    loss_of(model).backward()
    loss_of(pruned).backward()
    for (adapter, name), (other, same) in zip(weights(model), weights(pruned), strict=True):
        original = adapter.get_parameter(name)
        mask = adapter.get_buffer(f"{same}_mask")
        torch.testing.assert_close(original.grad, other.get_parameter(same).grad * mask, atol=1e-5, rtol=1e-4)
        prune.remove(adapter, same)
    assert torch.equal(logits(model), logits(pruned))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(family), tmp_path)), logits(pruned))


@over_rows_on("llama", "gpt2")
def test_parametrized_adapters_run_and_train(row, family):
    model = steer(tiny_model(family), row)
    halved = reference(model, Halved())
    assert not torch.allclose(logits(halved), logits(model), atol=1e-3)
    names = weights(model)
    for adapter, name in names:
        parametrize.register_parametrization(adapter, name, Halved())
    assert torch.equal(logits(model), logits(halved))
    loss_of(model).backward()
    loss_of(halved).backward()
    for (adapter, name), (other, same) in zip(names, weights(halved), strict=True):
        gradient = adapter.parametrizations[name].original.grad
        torch.testing.assert_close(gradient, other.get_parameter(same).grad / 2, atol=1e-5, rtol=1e-4)
    for adapter, name in names:
        parametrize.remove_parametrizations(adapter, name)
    assert torch.equal(logits(model), logits(halved))
