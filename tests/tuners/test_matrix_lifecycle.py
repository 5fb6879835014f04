"""Saving, loading, several adapters, merging and unloading, on every family of models, for every kind of adapter."""

from __future__ import annotations

import peft
import pytest
import torch
from model_zoo import FAMILIES, HIDDEN_SIZE, NUM_BLOCKS, tiny_inputs, tiny_model
from packaging.version import parse
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from steering_cases import (
    KINDS,
    adapters_of,
    assert_same_weights,
    layers_of,
    logits,
    over_families,
    over_kinds,
    steer,
    steering_config,
    weights_of,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

CAUSAL_LM = [name for name, family in FAMILIES.items() if not family.text_config]


def expected_shapes(family: str, kind: str) -> dict[str, tuple[int, ...]]:
    leaves = {"vector": (HIDDEN_SIZE,)}
    if kind != "vector":
        r = KINDS[kind]["r"]
        leaves = {"down": (r, HIDDEN_SIZE), "up": (HIDDEN_SIZE, r)}
    return {
        f"base_model.model.{FAMILIES[family].blocks}.{index}.post_block_steering.steering_adapter.{leaf}": shape
        for index in range(NUM_BLOCKS)
        for leaf, shape in leaves.items()
    }


def load_with_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def load_with_peft_low_cpu_mem(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def load_with_transformers(base, folder):
    base.load_adapter(str(folder))
    return base


def inject_and_set(base, folder):
    inject_adapter_in_model(steering_config_of(folder), base)
    set_peft_model_state_dict(base, load_file(folder / "adapter_model.safetensors"))
    return base


def inject_from_state_dict(base, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    inject_adapter_in_model(steering_config_of(folder), base, state_dict=tensors, low_cpu_mem_usage=True)
    set_peft_model_state_dict(base, tensors, low_cpu_mem_usage=True)
    return base


def steering_config_of(folder):
    return type(steering_config()).from_pretrained(folder)


WAYS_TO_LOAD = [
    load_with_peft,
    load_with_peft_low_cpu_mem,
    load_with_transformers,
    inject_and_set,
    inject_from_state_dict,
]


@over_kinds
@over_families
def test_saved_adapter_loads_exactly_in_every_way(family, kind, tmp_path):
    model = steer(tiny_model(family), kind, scaling=0.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == expected_shapes(family, kind)
    for load in WAYS_TO_LOAD:
        loaded = load(tiny_model(family), tmp_path).eval()
        assert torch.equal(logits(loaded), expected), load.__name__


@pytest.mark.parametrize("family", CAUSAL_LM)
def test_auto_class_loads_base_and_adapter(family, tmp_path):
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    model = steer(base)
    expected = logits(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"transformers adds adapters of any type from PEFT {MIN_PEFT_VERSION} on, and this is {peft.__version__}",
)
@over_kinds
@over_families
def test_transformers_can_add_train_and_save_an_adapter_itself(family, kind, tmp_path):
    base = tiny_model(family)
    unsteered = logits(base)
    base.add_adapter(steering_config(kind), adapter_name="mine")
    assert {name for name, p in base.named_parameters() if p.requires_grad} == {
        name for name, _ in base.named_parameters() if ".steering_adapter.mine." in name
    }
    expected = logits(base)
    assert not torch.allclose(expected, unsteered, atol=1e-3)
    base.disable_adapters()
    assert torch.equal(logits(base), unsteered)
    base.enable_adapters()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(load_with_peft(tiny_model(family), tmp_path)), expected)
    base.delete_adapter("mine")
    assert torch.equal(logits(base), unsteered)


@over_kinds
@over_families
def test_updates_of_several_active_adapters_add(family, kind):
    base = tiny_model(family)
    model = steer(base, kind, "a", seed=1)
    only_a = logits(model)
    steer(model, kind, "b", seed=2)
    assert torch.equal(logits(model), only_a)  # adding does not activate
    model.set_adapter("b")
    only_b = logits(model)
    model.base_model.set_adapter(["a", "b"])
    # In the first block both read the same h, so there the sum is exact.
    h = torch.randn(2, 5, HIDDEN_SIZE)
    layer = layers_of(model)[0]
    updates = [layer.adapters[name](h) - h for name in ("a", "b")]
    torch.testing.assert_close(layer(h), h + sum(updates), atol=1e-5, rtol=1e-5)
    both = logits(model)
    assert not torch.allclose(both, only_a, atol=1e-3)
    assert not torch.allclose(both, only_b, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(family)))


@over_kinds
@over_families
def test_every_row_of_a_batch_may_have_its_own_adapter(family, kind):
    model = steer(tiny_model(family), kind, "a", seed=1)
    steer(model, kind, "b", seed=2, layers_to_transform=[0, 2])
    names = ["a", "__base__", "b", "a", "b"]
    inputs = tiny_inputs(rows=5)
    expected = {}
    with model.disable_adapter():
        expected["__base__"] = logits(model, inputs)
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = logits(model, inputs)
    mixed = logits(model, {**inputs, "adapter_names": names})
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, inputs), expected["b"])  # nothing of it stays behind


def anatomy(model) -> dict[str, tuple]:
    """All that a tuner could have left in a model: modules, attributes, hooks, parameters."""
    return {
        name: (
            id(module),
            type(module),
            sorted(vars(module)),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
            [(key, id(parameter)) for key, parameter in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


@over_kinds
@over_families
def test_unload_gives_back_the_very_same_base_model(family, kind):
    base = tiny_model(family)
    expected = logits(base)
    before, weights = anatomy(base), weights_of(base)
    model = steer(base, kind, "a")
    steer(model, kind, "b", layers_to_transform=[1])
    logits(model)
    unloaded = model.unload()
    assert unloaded is base
    assert anatomy(base) == before
    assert base.state_dict().keys() == weights.keys()
    assert_same_weights(base, weights)
    assert torch.equal(logits(base), expected)


@over_kinds
@over_families
def test_merging_survives_saving_or_is_refused_with_nothing_changed(family, kind, tmp_path):
    base = tiny_model(family)
    weights = weights_of(base)
    model = steer(base, kind)
    expected = logits(model)
    if not (kind == "vector" and FAMILIES[family].folds_vector):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged") as error:
                merge()
            assert kind == "vector" or "vLLM" in str(error.value)
            assert_same_weights(base, weights)
            assert torch.equal(logits(model), expected)
        assert not any(layer.merged for layer in layers_of(model))
        return

    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert_same_weights(base, weights)
    assert torch.equal(logits(model), expected)

    merged = model.merge_and_unload()
    assert not layers_of(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path)), logits(merged))


@over_kinds
@over_families
def test_state_dict_of_an_adapter_can_be_moved_to_another_name(family, kind):
    model = steer(tiny_model(family), kind, "first", seed=1)
    expected = logits(model)
    steer(model, kind, "second", seed=2)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="first"), adapter_name="second")
    for one, other in zip(adapters_of(model, "first"), adapters_of(model, "second"), strict=True):
        for key, parameter in one.named_parameters():
            assert torch.equal(parameter, other.get_parameter(key))
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
