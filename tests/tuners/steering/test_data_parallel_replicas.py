"""Copies that `nn.DataParallel` makes of a steered model for each further GPU, made here without one.

`torch.nn.parallel.replicate` copies modules around `__deepcopy__` and puts tensors that are no parameters into them.
Only how it brings tensors to another device is replaced: they become float64, to be told apart.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from steering_cases import logits, parameters_of, steer
from tuner_cases import over_rows_on


@pytest.fixture
def replicate(monkeypatch):
    module = importlib.import_module("torch.nn.parallel.replicate")

    def converted(tensors, devices, detach=False):
        return [[tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]]

    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", converted)
    return lambda model: module.replicate(model, [0])[0]


@over_rows_on("llama", "gpt2", "opt")
def test_a_replica_computes_with_its_own_weights(row, family, replicate):
    model = steer(tiny_model(family), row)
    expected, unsteered = logits(copy.deepcopy(model).double()), logits(tiny_model(family))
    replica = replicate(model)
    for parameter in parameters_of(model).values():
        parameter.data.zero_()
    result = logits(replica)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), unsteered)  # and the original with the original's
    torch.testing.assert_close(logits(replica), expected, atol=1e-5, rtol=1e-5)


@over_rows_on("llama", "gpt2", "opt")
def test_gradients_of_a_replica_reach_the_original(row, family, replicate):
    model = steer(tiny_model(family), row)
    inputs = tiny_inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: parameter.grad for name, parameter in parameters_of(model).items()}
    model.zero_grad()
    replicate(model)(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in parameters_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3)


def test_the_second_of_two_replicas_computes_with_its_own_weights(replicate):
    """Of a site inside the block, whose hook has to find the layer of its own copy."""
    model = steer(tiny_model(), "post_mlp-vector")
    first = replicate(model)
    expected = logits(first)
    for parameter in parameters_of(model).values():
        parameter.data.mul_(-2)
    second = replicate(model)
    torch.testing.assert_close(logits(second), logits(copy.deepcopy(model).double()), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(second), expected, atol=1e-3)
