"""Gradients, gradient checkpointing and training steps, for every tuner, on families of models that differ."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from steering_cases import logits, parameters_of, steer, weights_of
from tuner_cases import ROWS, over_cases, over_rows_on

from trl_steer import steering_operator

CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def loss_of(model) -> torch.Tensor:
    inputs = tiny_inputs()
    return model(**inputs, labels=inputs["input_ids"]).loss


def gradients(model, checkpointing=None) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(checkpointing)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == bool(checkpointing)
    torch.manual_seed(0)  # some families drop out by default
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@over_cases
def test_gradients_are_equal_with_every_way_of_checkpointing(row, family):
    results = {
        name: gradients(steer(tiny_model(family), row), checkpointing) for name, checkpointing in CHECKPOINTING.items()
    }
    expected = results["off"]
    model = steer(tiny_model(family), row)
    assert expected.keys() == parameters_of(model).keys()
    assert expected.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ROWS[row].has_gates or all(gradient.abs().sum() > 0 for gradient in expected.values())
    for name in ("reentrant", "non-reentrant"):
        assert results[name].keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.equal(results[name][key], gradient), (name, key)


@over_cases
def test_both_operators_give_the_same_gradients(row, family):
    expected = gradients(steer(tiny_model(family), row))
    with steering_operator("plain"):
        plain = gradients(steer(tiny_model(family), row))
    assert plain.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(plain[key], gradient, atol=1e-5, rtol=1e-3)


@over_cases
def test_training_changes_every_adapter_parameter_and_nothing_else(row, family):
    base = tiny_model(family)
    unsteered = logits(base)
    model = steer(base, row, fresh=True)
    before = weights_of(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):  # what multiplies a factor of zero moves from the second step on
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == parameters_of(model).keys()
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), unsteered)


@over_rows_on("llama", "gpt2", "mixtral")
def test_fp32_adapters_train_on_a_bf16_model(row, family):
    model = steer(tiny_model(family, dtype=torch.bfloat16), row)
    for gradient in gradients(model, {"use_reentrant": False}).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if name.endswith(("low_rank", "silu"))])
def test_dropout_is_active_in_training_only(row):
    model = steer(tiny_model(), row, dropout=0.5)
    evaluated = logits(model)
    assert torch.equal(logits(model), evaluated)
    model.train()
    assert not torch.equal(logits(model), logits(model))
