"""`torch.compile` and `torch.export` of steered models."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from steering_cases import logits, parameters_of, steer
from torch import nn
from tuner_cases import ROWS

from trl_steer import set_scaling

# "eager" runs what dynamo traced, without code generation: it shows graph breaks, bad guards and wrong traces.
SLOW = pytest.mark.slow
# Each site and each form is in some other row.
TRACED_ALIKE = ("pre_mlp-silu", "pre_mlp-vector", "post_mlp-low_rank", "post_mlp-vector", "post_attn-low_rank")
TRACED_ALIKE += ("post_attn-silu", "lofit", "lofit-scale", "joint-vector")
CASES = [
    ("llama", "eager", "low_rank"),
    ("gpt2", "eager", "vector"),
    pytest.param("gpt2", "eager", "pre_mlp-low_rank", marks=SLOW),
    pytest.param("llama", "eager", "joint-vector", marks=SLOW),
    pytest.param("llama", "eager", "silu", marks=SLOW),
    pytest.param("opt", "eager", "post_mlp-vector", marks=SLOW),
    pytest.param("llama", "eager", "lofit-heads", marks=SLOW),
    pytest.param("gpt2", "eager", "jola", marks=SLOW),
    pytest.param("gemma3", "eager", "post_attn-silu", marks=SLOW),
    pytest.param("gpt2", "eager", "joint-low_rank", marks=SLOW),
    pytest.param("llama", "aot_eager", "low_rank", marks=SLOW),
    pytest.param("llama", "inductor", "silu", marks=SLOW),
    pytest.param("llama", "inductor", "vector", marks=SLOW),
    pytest.param("llama", "inductor", "joint-low_rank", marks=SLOW),
    pytest.param("gpt2", "inductor", "pre_mlp-low_rank", marks=SLOW),
    pytest.param("gemma3", "eager", "low_rank", marks=SLOW),
    pytest.param("mixtral", "eager", "low_rank", marks=SLOW),
    pytest.param("gpt_oss", "eager", "silu", marks=SLOW),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "backend", "row"), CASES)
def test_compiled_model_equals_eager_whatever_is_switched(family, backend, row):
    layer_types = {"layer_types": ["sliding_attention", "full_attention"]} if family in ("gemma3", "gpt_oss") else {}
    model = steer(tiny_model(family, num_hidden_layers=2, **layer_types), row, layers_to_transform=[0, 1])
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


@pytest.mark.parametrize("row", [pytest.param(row, marks=SLOW) if row in TRACED_ALIKE else row for row in ROWS])
def test_compiled_model_is_one_graph(row):
    model = steer(tiny_model(num_hidden_layers=1), row, layers_to_transform=[0])
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-5, rtol=1e-5)


def test_code_generated_for_a_tiny_model_equals_eager():
    """The one run of Inductor that is not slow."""
    model = steer(tiny_model(num_hidden_layers=1))
    compiled = torch.compile(model.get_base_model(), backend="inductor")
    torch.testing.assert_close(logits(compiled), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "row",
    [
        "silu",
        pytest.param("vector", marks=SLOW),
        pytest.param("pre_mlp-low_rank", marks=SLOW),
        pytest.param("joint-low_rank", marks=SLOW),
    ],
)
def test_compiled_gradients_equal_eager(row):
    inputs = tiny_inputs()
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model = steer(tiny_model(num_hidden_layers=2), row).train()
        wrap(model)(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in parameters_of(model).values()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


class LogitsOnly(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("row", "family"),
    [
        ("vector", "llama"),
        ("silu", "llama"),
        ("low_rank", "gpt2"),
        ("pre_mlp-low_rank", "gpt2"),
        ("post_attn-vector", "gemma3"),
        ("joint-low_rank", "llama"),
    ],
)
def test_exported_program_is_steered(row, family):
    model = steer(tiny_model(family), row)
    input_ids = tiny_inputs()["input_ids"]
    program = torch.export.export(LogitsOnly(model.get_base_model()), (input_ids,))
    trained = {name.removeprefix("base_model.") for name in parameters_of(model)}
    assert trained <= program.state_dict.keys()
    expected = logits(model, {"input_ids": input_ids})
    torch.testing.assert_close(program.module()(input_ids), expected, atol=1e-5, rtol=1e-5)
