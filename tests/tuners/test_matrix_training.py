"""Gradients, gradient checkpointing and training steps, on every family of models, for every kind of adapter."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from steering_cases import adapters_of, assert_same_weights, over_families, over_kinds, steer, weights_of

from trl_steer import steering_operator

CHECKPOINTING = {"off": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def loss_of(model) -> torch.Tensor:
    inputs = tiny_inputs()
    return model(**inputs, labels=inputs["input_ids"]).loss


def gradients(model, checkpointing) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == bool(checkpointing)
    torch.manual_seed(0)  # some families drop out by default
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@over_kinds
@over_families
def test_gradients_are_equal_with_every_way_of_checkpointing(family, kind):
    results = {
        name: gradients(steer(tiny_model(family), kind), checkpointing)
        for name, checkpointing in CHECKPOINTING.items()
    }
    expected = results["off"]
    model = steer(tiny_model(family), kind)
    assert expected.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for name in ("reentrant", "non-reentrant"):
        assert results[name].keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.equal(results[name][key], gradient), (name, key)


@over_kinds
@over_families
def test_both_operators_give_the_same_gradients(family, kind):
    expected = gradients(steer(tiny_model(family), kind), None)
    with steering_operator("plain"):
        plain = gradients(steer(tiny_model(family), kind), None)
    assert plain.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(plain[key], gradient, atol=1e-5, rtol=1e-3)


@over_kinds
@over_families
def test_training_changes_every_adapter_parameter_and_nothing_else(family, kind):
    base = tiny_model(family)
    weights = weights_of(base)
    model = steer(base, kind, init_weights=True).train()
    before = [parameter.detach().clone() for adapter in adapters_of(model) for parameter in adapter.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):  # with W_up = 0, W_down moves from the second step on
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [parameter for adapter in adapters_of(model) for parameter in adapter.parameters()]
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert_same_weights(base, weights)


@over_kinds
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fp32_adapters_train_on_a_bf16_model(family, kind):
    model = steer(tiny_model(family, dtype=torch.bfloat16), kind)
    for gradient in gradients(model, {"use_reentrant": False}).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["low_rank", "silu"])
def test_dropout_is_active_in_training_only(kind):
    model = steer(tiny_model(), kind, dropout=0.5)
    with torch.no_grad():
        evaluated = model(**tiny_inputs()).logits
        assert torch.equal(model(**tiny_inputs()).logits, evaluated)
        model.train()
        assert not torch.equal(model(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
