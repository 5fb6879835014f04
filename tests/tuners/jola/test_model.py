"""JoLA computes its formulas, with gates that are drawn in training and fixed in evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from head_cases import BASES, NUM_HEADS, assert_equal, double_model, run, run_plainly, steered, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import tiny_model
from peft import PeftConfig, PeftType, get_peft_model
from steering_cases import adapters_of, logits, steer

from trl_steer import JolaConfig
from trl_steer.tuners.jola.layer import open_probability, sampled_gate
from trl_steer.tuners.steering import TrainingProgress, adapter_penalty

over_bases = pytest.mark.parametrize("base", BASES)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def drawn_gate(u, log_gate):
    return torch.clamp(sigmoid((torch.log(u / (1 - u)) + log_gate) / 0.33) * 1.2 - 0.1, 0, 1)


def fixed_gate(log_gate):
    return torch.clamp(sigmoid(log_gate) * 1.2 - 0.1, 0, 1)


def update_with(gate1, gate2, scaling=1.0):
    """`x + s * (g2 * a * x + g1 * v)`, the tensors in the order in which the adapter has them."""

    def update(x, block, offset, scale, offset_log_gate, scale_log_gate):
        g1, g2 = gate1(block, offset_log_gate)[:, None], gate2(block, scale_log_gate)[:, None]
        return x + scaling * (g2 * scale * x + g1 * offset)

    return update


@over_bases
@pytest.mark.parametrize("scaling", [1.0, -0.7])
def test_logits_and_gradients_in_evaluation_are_those_of_the_formula(scaling, base):
    model = steered(base, "jola", scaling=scaling)
    expected = run_plainly(
        base,
        tensors_of(model),
        update_with(lambda _, gate: fixed_gate(gate), lambda _, gate: fixed_gate(gate), scaling),
    )
    found = run(model)
    assert_equal([*found[:2], *found[2]], [*expected[:2], *expected[2]])
    assert all(gradient.abs().sum() > 0 for gradient in found[2])


@over_bases
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_and_gradients_in_training_are_those_of_the_formula_for_what_is_drawn(seed, base):
    model = steered(base, "jola")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(3, 2, NUM_HEADS, generator=generator, dtype=torch.float64)
    for adapter, draw in zip(adapters_of(model), draws, strict=True):
        adapter.train()  # and not the model, which may have dropout
        adapter.draw_uniform = lambda draw=draw: draw
    expected = run_plainly(
        base,
        tensors_of(model),
        update_with(
            lambda block, log_gate: drawn_gate(draws[block, 0], log_gate),
            lambda block, log_gate: drawn_gate(draws[block, 1], log_gate),
        ),
    )
    found = run(model)
    assert_equal([*found[:2], *found[2]], [*expected[:2], *expected[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_draws_are_uniform_and_new_at_every_forward(dtype):
    adapter = adapters_of(steer(tiny_model(), "jola"))[0].to(dtype)
    draws = torch.stack([adapter.draw_uniform() for _ in range(2000)])
    assert draws.shape == (2000, 2, NUM_HEADS)
    assert draws.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert draws.min() >= 1e-6 * 0.99
    assert draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert draws.std() == pytest.approx(12**-0.5, abs=0.01)


def test_a_model_in_training_draws_and_in_evaluation_does_not():
    model = steer(tiny_model(), "jola")
    fixed = logits(model)
    assert torch.equal(logits(model), fixed)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), fixed)


@settings(max_examples=50, deadline=None)
@given(log_gate=st.floats(-6, 6))
def test_drawn_gates_are_open_as_often_as_the_penalty_says(log_gate):
    u = torch.linspace(1e-6, 1 - 1e-6, 20_001, dtype=torch.float64)
    gates = sampled_gate(torch.full_like(u, log_gate), u)
    is_open = float((gates > 0).double().mean())
    assert float(open_probability(torch.tensor(log_gate, dtype=torch.float64))) == pytest.approx(is_open, abs=1e-3)


def test_initial_values_are_those_of_the_method():
    heads = 48
    wide = {"hidden_size": 384, "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": 8}
    adapters = adapters_of(steer(tiny_model(**wide), "jola", fresh=True))
    for name in ("offset", "scale"):
        values = torch.cat([getattr(adapter, name).detach().flatten() for adapter in adapters])
        assert values.std() == pytest.approx(1e-3, rel=0.1)
    bound = math.sqrt(6 / (heads + 1))
    for name in ("offset_log_gate", "scale_log_gate"):
        values = torch.cat([getattr(adapter, name).detach() for adapter in adapters])
        assert 0.9 * bound < values.abs().max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


# Penalty


def penalty_of(model, w: float) -> torch.Tensor:
    """As it is written down, with `L` and `H` of the model."""

    def p(log_gate):
        return torch.clamp(sigmoid(log_gate + 0.33 * math.log(11)), 1e-6, 1 - 1e-6)

    adapters = adapters_of(model)
    offsets = sum(p(adapter.offset_log_gate).mean() for adapter in adapters)
    scales = sum(p(adapter.scale_log_gate).mean() for adapter in adapters)
    return (w * offsets + (1 - w) * scales) / (len(adapters) * NUM_HEADS)


@pytest.mark.parametrize(
    ("fields", "step", "w"),
    [
        ({}, 0, 0.1),
        ({}, 1, 0.1 * math.exp(-0.01)),
        ({}, 100, 0.1 * math.exp(-1)),
        ({"penalty_weight": 0.5}, 50, 0.5 * math.exp(-0.5)),
        ({"penalty_schedule": "linear"}, 0, 0.0),
        ({"penalty_schedule": "linear"}, 50, 0.05),
        ({"penalty_schedule": "linear"}, 200, 0.2),
        ({"penalty_schedule": "linear", "penalty_weight": 1.0}, 100, 0.5),
        ({"penalty_schedule": "constant"}, 0, 0.1),
        ({"penalty_schedule": "constant", "penalty_weight": 0.7}, 150, 0.7),
    ],
)
def test_the_penalty_and_its_gradients_are_the_formula_at_every_step_of_every_schedule(fields, step, w):
    model = steered("llama", "jola", **fields)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = adapter_penalty(model, step, max_steps=200), penalty_of(model, w)
    assert_equal([found], [expected])
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, expected)]
    assert [gradient is None for gradient in gradients[0]] == [True, True, False, False] * 3
    assert_equal(*([g for g in gradient if g is not None] for gradient in gradients))


def test_blocks_without_the_adapter_do_not_count():
    model = steered("llama", "jola", layers_to_transform=[0, 2], penalty_schedule="constant")
    assert_equal([adapter_penalty(model)], [penalty_of(model, 0.1)])


def test_the_penalty_is_of_what_is_trained():
    model = steer(steer(double_model("llama"), "jola", "a"), "jola", "b", seed=1)
    only_a = adapter_penalty(model)
    model.set_adapter("b")
    assert adapter_penalty(model) != only_a
    model.set_adapter("a")
    assert adapter_penalty(model) == only_a
    with model.disable_adapter():
        assert adapter_penalty(model) is None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert adapter_penalty(model) is None


@pytest.mark.parametrize("row", ["low_rank", "vector", "lofit", "joint-low_rank"])
def test_other_adapter_types_have_no_penalty(row):
    assert adapter_penalty(steer(tiny_model(), row)) is None


def test_the_penalty_of_the_first_phase_of_lofit_is_the_sum_of_absolute_values():
    model = steered("llama", "lofit-scale", penalty_weight=0.3)
    found = adapter_penalty(model, step=7)
    assert_equal([found], [0.3 * sum(adapter.scale.abs().sum() for adapter in adapters_of(model))])
    for adapter in adapters_of(model):
        (gradient,) = torch.autograd.grad(adapter.penalty(TrainingProgress()), [adapter.scale])
        assert_equal([gradient], [0.3 * adapter.scale.sign()])


# Configuration


def test_defaults_are_the_documented_ones(tmp_path):
    config = JolaConfig()
    assert config.peft_type == PeftType.JOLA
    assert (config.site, config.penalty_schedule, config.penalty_weight) == ("heads", "exponential", 0.1)
    assert JolaConfig(penalty_schedule="linear").penalty_weight == 0.2
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"penalty_schedule": "cosine"}, ValueError, ["'cosine'", "'exponential'", "'linear'", "'constant'"]),
        ({"penalty_schedule": ["linear"]}, ValueError, ["['linear']"]),
        ({"penalty_weight": 1.5}, ValueError, ["from 0 to 1", "1.5"]),
        ({"penalty_weight": -0.1}, ValueError, ["from 0 to 1", "-0.1"]),
        ({"penalty_weight": "a bit"}, TypeError, ["penalty_weight", "'a bit'"]),
    ],
)
def test_impossible_values_are_refused_with_what_was_given_and_what_is_allowed(fields, error, said):
    with pytest.raises(error) as info:
        JolaConfig(**fields)
    for text in said:
        assert text in str(info.value)


def test_an_adapter_has_a_factor_an_offset_and_their_gates_for_each_query_head():
    model = get_peft_model(tiny_model(), JolaConfig())
    shapes = {name: tuple(p.shape) for name, p in adapters_of(model)[0].named_parameters()}
    assert shapes == {"offset": (4, 8), "scale": (4, 8), "offset_log_gate": (4,), "scale_log_gate": (4,)}
