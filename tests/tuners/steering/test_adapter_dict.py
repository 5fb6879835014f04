"""Adding an adapter to a model that has others."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_model
from peft import PeftModel
from steering_cases import adapters_of, layers_of, logits, parameters_of, steer, steering_config
from torch import nn

from trl_steer.tuners.steering import SteeringAdapter
from trl_steer.tuners.steering.adapter_dict import only_adapter
from trl_steer.tuners.steering.matching import modules_outside_adapters


@pytest.fixture
def visited(monkeypatch):
    """The adapters that walks through the model and state dicts have come to."""
    seen = {"named_modules": set(), "state_dict": set()}
    for name, adapters in seen.items():
        original = getattr(nn.Module, name)

        def record(self, *args, original=original, adapters=adapters, **kwargs):
            adapters.add(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SteeringAdapter, name, record)
    return seen


@pytest.mark.parametrize("row", ["low_rank", "pre_mlp-vector", "loreft", "joint-low_rank"])
def test_adding_an_adapter_walks_through_none_of_the_others(row, visited):
    model = steer(steer(tiny_model(), row, "a"), row, "b")
    before = {adapter for name in "ab" for adapter in adapters_of(model, name)}
    for adapters in visited.values():
        adapters.clear()
    model.add_adapter("c", steering_config(row))
    assert visited["named_modules"]
    assert not before & (visited["named_modules"] | visited["state_dict"])


def test_loading_an_adapter_checks_no_other(visited, tmp_path):
    model = steer(steer(tiny_model(), "low_rank", "a"), "low_rank", "b", seed=1)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    visited["state_dict"].clear()
    model.load_adapter(tmp_path / "b", "c")
    assert visited["state_dict"] == {*adapters_of(model, "c")}
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("c")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_others_stay_active_and_trainable_or_frozen_as_they_are(fails):
    model = steer(steer(tiny_model(), "low_rank", "a"), "low_rank", "b", layers_to_transform=[0])
    for parameter in parameters_of(model, "a").values():
        parameter.requires_grad_(False)  # active, but frozen
    for parameter in parameters_of(model, "b").values():
        parameter.requires_grad_(True)  # the reverse
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    if fails:
        with pytest.raises(ValueError, match=r"layers_to_transform contains \[9\]"):
            model.add_adapter("c", steering_config("low_rank", layers_to_transform=[9]))
    else:
        model.add_adapter("c", steering_config("low_rank"))
        assert not any(parameter.requires_grad for parameter in parameters_of(model, "c").values())
        assert ["c" in layer.adapters for layer in layers_of(model)] == [True] * len(layers_of(model))
    after = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert {name: value for name, value in after.items() if ".c." not in name} == before
    assert [layer.active_adapters for layer in layers_of(model)] == [["a"]] * len(layers_of(model))


def test_first_adapter_of_a_block_is_active_only_if_the_model_says_so():
    model = steer(tiny_model(), "low_rank", "a", layers_to_transform=[0])
    steer(model, "low_rank", "b", layers_to_transform=[1])
    assert [layer.active_adapters for layer in layers_of(model)] == [["a"], ["a"]]
    assert not any(parameter.requires_grad for parameter in parameters_of(model, "b").values())
    model.set_adapter("b")
    assert all(parameter.requires_grad for parameter in parameters_of(model, "b").values())


@pytest.mark.parametrize("row", ["low_rank", "joint-low_rank"])
def test_modules_outside_adapters_are_the_same_however_many_adapters_there_are(row):
    model = steer(tiny_model(), row, "a")
    before = dict(modules_outside_adapters(model))
    assert before.items() <= dict(model.named_modules()).items()
    assert {*dict(model.get_base_model().named_modules())} <= {
        *(name.removeprefix("base_model.model.") for name in before),
        *(name for name, _ in model.get_base_model().named_modules() if ".a" in name),
    }
    assert dict(modules_outside_adapters(steer(model, row, "b"))) == before


def test_outside_of_the_context_nothing_is_left_out():
    model: PeftModel = steer(steer(tiny_model(), "low_rank", "a"), "low_rank", "b")
    keys = model.state_dict().keys()
    with only_adapter("b"):
        assert {key for key in keys if ".a." not in key} == model.state_dict().keys()
        assert {name for name, _ in model.named_parameters() if ".a." in name} == set()
    assert model.state_dict().keys() == keys
    assert {name for name, _ in model.named_parameters()} == keys
