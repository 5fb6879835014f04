"""The scaling of an adapter, and replacing one in place."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from steering_cases import (
    adapters_of,
    assert_same_weights,
    logits,
    over_kinds,
    steer,
    steering_config,
    update_of,
    weights_of,
)

from trl_steer import adapter_scaling, hotswap_adapter, set_scaling


@over_kinds
@settings(max_examples=30, deadline=None)
@given(value=st.floats(-50, 50, width=32))
def test_scaling_multiplies_the_update(kind, value):
    model = steer(tiny_model(num_hidden_layers=1), kind)
    adapter = adapters_of(model)[0]
    h = torch.randn(2, 3, 32)
    update = update_of(adapter, h).detach()
    set_scaling(model, "default", value)
    torch.testing.assert_close(adapter(h), h + value * update, atol=1e-4, rtol=1e-4)


@over_kinds
def test_scaling_of_zero_is_the_base_model_and_survives_saving(kind, tmp_path):
    model = steer(tiny_model(), kind)
    trained = logits(model)
    model.set_scaling("default", 0)
    assert torch.equal(logits(model), logits(tiny_model()))
    model.set_scaling("default", -2.5)
    turned = logits(model)
    assert not torch.allclose(turned, trained, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.peft_config["default"].scaling == -2.5
    assert torch.equal(logits(loaded), turned)


@over_kinds
def test_scaling_is_set_for_one_adapter_only(kind):
    model = steer(steer(tiny_model(), kind, "a", seed=1), kind, "b", seed=2)
    only_a = logits(model)
    set_scaling(model, "b", 3.0)
    assert torch.equal(logits(model), only_a)
    assert (model.peft_config["a"].scaling, model.peft_config["b"].scaling) == (1.0, 3.0)


def test_adapters_with_one_config_object_have_a_scaling_each():
    config = steering_config()
    model = get_peft_model(tiny_model(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    set_scaling(model, "b", 3.0)
    assert model.peft_config["a"].scaling == 1.0
    assert {adapter.scaling for adapter in adapters_of(model, "a")} == {1.0}


@over_kinds
def test_scaling_of_a_with_block_is_restored_even_after_an_error(kind):
    model = steer(tiny_model(), kind, scaling=0.75)
    expected = logits(model)
    with adapter_scaling(model, "default", 0.0):
        assert torch.equal(logits(model), logits(tiny_model()))
        with model.adapter_scaling("default", 2.0):
            assert not torch.allclose(logits(model), expected, atol=1e-3)
        assert torch.equal(logits(model), logits(tiny_model()))
    with pytest.raises(KeyError), adapter_scaling(model, "default", 0.0):
        raise KeyError
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].scaling == 0.75


def test_scaling_works_on_a_model_with_injected_adapters():
    model = inject_adapter_in_model(steering_config(), tiny_model())
    set_scaling(model, "default", 0.0)
    assert torch.equal(logits(model), logits(tiny_model()))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("nobody", 1.0, ValueError, r"no steering adapter 'nobody'.*\['default'\]"),
        ("default", float("nan"), ValueError, "finite"),
        ("default", float("inf"), ValueError, "finite"),
        ("default", "1", TypeError, "number"),
        ("default", True, TypeError, "number"),
        ("default", None, TypeError, "number"),
    ],
)
def test_impossible_scaling_is_refused_and_changes_nothing(name, value, error, message):
    model = steer(tiny_model())
    expected = logits(model)
    with pytest.raises(error, match=message):
        set_scaling(model, name, value)
    with pytest.raises(error, match=message), adapter_scaling(model, name, value):
        pass
    assert torch.equal(logits(model), expected)


def test_scaling_of_a_merged_vector_cannot_be_set():
    model = steer(tiny_model("gpt2"), "vector")
    model.merge_adapter()
    expected = logits(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_scaling(model, "default", 0.5)
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    set_scaling(model, "default", 0.0)
    assert torch.equal(logits(model), logits(tiny_model("gpt2")))


# Hot swap


@over_kinds
def test_hot_swap_makes_the_adapter_the_other_one_in_place(kind, tmp_path):
    other = steer(tiny_model(), kind, seed=5, scaling=0.5)
    other.save_pretrained(tmp_path)
    model = steer(tiny_model(), kind, seed=1)
    parameters = [id(parameter) for parameter in model.parameters()]
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert model.peft_config["default"].scaling == 0.5


def test_hot_swap_reaches_a_named_adapter_and_no_other(tmp_path):
    other = steer(tiny_model(), seed=5)
    other.save_pretrained(tmp_path)
    model = steer(steer(tiny_model(), adapter_name="a", seed=1), adapter_name="b", seed=2)
    expected = logits(model)
    hotswap_adapter(model, str(tmp_path), "b")
    assert torch.equal(logits(model), expected)
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(other))


def test_hot_swap_works_on_a_model_with_injected_adapters(tmp_path):
    other = steer(tiny_model(), seed=5)
    other.save_pretrained(tmp_path)
    model = inject_adapter_in_model(steering_config(), tiny_model()).eval()
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_compiled_code_sees_the_swapped_weights(tmp_path):
    other = steer(tiny_model(num_hidden_layers=1), seed=5)
    other.save_pretrained(tmp_path)
    model = steer(tiny_model(num_hidden_layers=1), seed=1)
    compiled = torch.compile(model, backend="eager")
    logits(compiled)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(logits(compiled), logits(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("low_rank", {"r": 5}, "its r is 5, but the loaded adapter has 3"),
        ("silu", {}, "its activation is 'silu', but the loaded adapter has None"),
        ("vector", {}, "its steering_type is 'vector', but the loaded adapter has 'low_rank'"),
        ("low_rank", {"layers_to_transform": [0, 1]}, r"layers\.2.*missing"),
        (
            "low_rank",
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save is \['lm_head'\], but.* has None",
        ),
        (
            "low_rank",
            {"trainable_token_indices": [1]},
            r"trainable_token_indices is \[1\], but.* has None",
        ),
    ],
)
def test_hot_swap_of_another_form_is_refused_and_changes_nothing(kind, fields, message, tmp_path):
    steer(tiny_model(), kind, seed=5, **fields).save_pretrained(tmp_path)
    assert_swap_refused(tmp_path, message)


def test_hot_swap_refuses_broken_weights_another_method_and_unknown_names(tmp_path):
    broken = steer(tiny_model(), seed=5)
    adapters_of(broken)[1].up.data[3, 1] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    assert_swap_refused(tmp_path / "broken", r"layers\.1.*NaN")
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=3))
    lora.save_pretrained(tmp_path / "lora")
    assert_swap_refused(tmp_path / "lora", "peft_type")
    steer(tiny_model()).save_pretrained(tmp_path / "good")
    assert_swap_refused(tmp_path / "good", "no steering adapter 'nobody'", adapter_name="nobody")


def test_hot_swap_of_an_offloaded_adapter_is_refused(tmp_path):
    steer(tiny_model(), seed=5).save_pretrained(tmp_path)
    model = steer(tiny_model(), seed=1)
    expected = logits(model)
    model = cpu_offload(model)
    with pytest.raises(ValueError, match="offloaded"):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)


def assert_swap_refused(folder, message, **kwargs):
    model = steer(tiny_model(), seed=1)
    weights, config, expected = weights_of(model), copy.deepcopy(model.peft_config), logits(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, folder, **kwargs)
    assert_same_weights(model, weights)
    assert model.peft_config == config
    assert torch.equal(logits(model), expected)
