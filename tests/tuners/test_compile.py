"""`torch.compile` and `torch.export` of steered models."""

from __future__ import annotations

import pytest
import torch
from model_zoo import NUM_BLOCKS, tiny_inputs, tiny_model
from steering_cases import adapters_of, logits, over_kinds, steer
from torch import nn

from trl_steer import set_scaling

# "eager" runs what dynamo traced, without code generation: it shows graph breaks, bad guards and wrong traces.
SLOW = pytest.mark.slow
CASES = [
    ("llama", "eager", "low_rank"),
    ("gpt2", "eager", "vector"),
    pytest.param("llama", "eager", "silu", marks=SLOW),
    pytest.param("llama", "aot_eager", "low_rank", marks=SLOW),
    pytest.param("llama", "inductor", "silu", marks=SLOW),
    pytest.param("llama", "inductor", "vector", marks=SLOW),
    pytest.param("gemma3", "eager", "low_rank", marks=SLOW),
    pytest.param("mixtral", "eager", "low_rank", marks=SLOW),
    pytest.param("gpt_oss", "eager", "silu", marks=SLOW),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "backend", "kind"), CASES)
def test_compiled_model_equals_eager_whatever_is_switched(family, backend, kind):
    layer_types = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gemma3", "gpt_oss") else {}
    model = steer(tiny_model(family, num_hidden_layers=2, **layer_types), kind)
    compiled = torch.compile(model, backend=backend)
    expected = logits(model)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        unsteered = logits(model)
        torch.testing.assert_close(logits(compiled), unsteered, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, unsteered, atol=1e-3)
    set_scaling(model, "default", -0.5)
    turned = logits(model)
    assert not torch.allclose(turned, expected, atol=1e-3)
    torch.testing.assert_close(logits(compiled), turned, atol=1e-4, rtol=1e-4)
    set_scaling(model, "default", 1.0)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)


@over_kinds
def test_compiled_model_is_one_graph(kind):
    model = steer(tiny_model(num_hidden_layers=1), kind)
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["silu", pytest.param("vector", marks=SLOW)])
def test_compiled_gradients_equal_eager(kind):
    inputs = tiny_inputs()
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model = steer(tiny_model(num_hidden_layers=2), kind).train()
        wrap(model)(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad for adapter in adapters_of(model) for p in adapter.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


class LogitsOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize(("family", "kind"), [("llama", "vector"), ("llama", "silu"), ("gpt2", "low_rank")])
def test_exported_program_is_steered(family, kind):
    model = steer(tiny_model(family), kind)
    input_ids = tiny_inputs()["input_ids"]
    program = torch.export.export(LogitsOnly(model.get_base_model()), (input_ids,))
    leaf = "vector" if kind == "vector" else "up"
    assert sum(name.endswith(f"steering_adapter.default.{leaf}") for name in program.state_dict) == NUM_BLOCKS
    expected = logits(model, {"input_ids": input_ids})
    torch.testing.assert_close(program.module()(input_ids), expected, atol=1e-5, rtol=1e-5)
