"""Saving, loading, several adapters, merging and unloading, for every tuner, on families of models that differ."""

from __future__ import annotations

import peft
import pytest
import torch
from model_zoo import FAMILIES, tiny_inputs, tiny_model
from packaging.version import parse
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from steering_cases import (
    assert_same_weights,
    layers_of,
    logits,
    parameters_of,
    steer,
    steering_config,
    weights_of,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from tuner_cases import ROWS, cases, over_cases, over_rows_on

CAUSAL_LM = tuple(name for name, family in FAMILIES.items() if not family.text_config)


def load_with_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)


def load_with_peft_low_cpu_mem(base, folder):
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def load_with_transformers(base, folder):
    base.load_adapter(str(folder))
    return base


def inject_and_set(base, folder):
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), base)
    set_peft_model_state_dict(base, load_file(folder / "adapter_model.safetensors"))
    return base


def inject_from_state_dict(base, folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), base, state_dict=tensors, low_cpu_mem_usage=True)
    set_peft_model_state_dict(base, tensors, low_cpu_mem_usage=True)
    return base


WAYS_TO_LOAD = [
    load_with_peft,
    load_with_peft_low_cpu_mem,
    load_with_transformers,
    inject_and_set,
    inject_from_state_dict,
]


@over_cases
def test_saved_adapter_loads_exactly_in_every_way(row, family, tmp_path):
    model = steer(tiny_model(family), row, scaling=0.5)
    expected = logits(model)
    assert not torch.equal(expected, logits(steer(tiny_model(family), row)))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name.replace(".default.", "."): parameter for name, parameter in parameters_of(model).items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[key], trained[key]) for key in saved)
    for load in WAYS_TO_LOAD:
        loaded = load(tiny_model(family), tmp_path).eval()
        assert torch.equal(logits(loaded), expected), load.__name__


@over_rows_on("llama", "gpt2")
def test_float32_weights_load_onto_a_bf16_model_without_rounding(row, family, tmp_path):
    model = steer(tiny_model(family), row).float()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())
    for load in (load_with_peft, load_with_peft_low_cpu_mem):
        loaded = load(tiny_model(family, dtype=torch.bfloat16), tmp_path)
        for name, parameter in parameters_of(loaded).items():
            if "lora_A" in name or "lora_B" in name:
                continue  # PEFT's own are rounded with `low_cpu_mem_usage`
            assert torch.equal(parameter, saved[name.replace(".default.", ".")]), (load.__name__, name)


@pytest.mark.parametrize(("row", "family"), cases(families=CAUSAL_LM))
def test_auto_class_loads_base_and_adapter(row, family, tmp_path):
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    model = steer(base, row)
    expected = logits(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


@pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"transformers adds adapters of any type from PEFT {MIN_PEFT_VERSION} on, and this is {peft.__version__}",
)
@over_cases
def test_transformers_can_add_train_and_save_an_adapter_itself(row, family, tmp_path):
    base = tiny_model(family)
    unsteered = logits(base)
    base.add_adapter(steering_config(row), adapter_name="mine")
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trainable == parameters_of(base, "mine").keys()
    assert {name.partition(".mine.")[0].rpartition(".")[2] for name in trainable} <= {
        "steering_adapter",
        "lora_steering_adapter",
        "lora_A",
        "lora_B",
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


@over_cases
def test_updates_of_several_active_adapters_add(row, family):
    model = steer(tiny_model(family), row, "a", seed=1)
    only_a = logits(model)
    steer(model, row, "b", seed=2)
    assert torch.equal(logits(model), only_a)  # adding does not activate
    model.set_adapter("b")
    only_b = logits(model)
    model.base_model.set_adapter(["a", "b"])
    seen = []
    handles = [
        layer.register_forward_hook(lambda layer, args, output: seen.append((layer, args[0], output)))
        for layer in layers_of(model)
    ]
    both = logits(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    for layer, h, output in seen:
        with torch.no_grad():
            expected = h + sum(layer.adapters[name](h) - h for name in ("a", "b"))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, only_a, atol=1e-3)
    assert not torch.allclose(both, only_b, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(family)))


@over_cases
def test_every_row_of_a_batch_may_have_its_own_adapter(row, family):
    model = steer(tiny_model(family), row, "a", seed=1)
    steer(model, row, "b", seed=2, layers_to_transform=[0, 2])
    names = ["a", "__base__", "b", "a", "b"]
    inputs = tiny_inputs(rows=5)
    expected = {}
    with model.disable_adapter():
        expected["__base__"] = logits(model, inputs)
    for name in ("a", "b"):
        model.set_adapter(name)
        expected[name] = logits(model, inputs)
    mixed = logits(model, {**inputs, "adapter_names": names})
    for index, name in enumerate(names):
        torch.testing.assert_close(mixed[index], expected[name][index], atol=1e-4, rtol=1e-4)
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


@over_cases
def test_unload_gives_back_the_very_same_base_model(row, family):
    base = tiny_model(family)
    expected = logits(base)
    before, weights = anatomy(base), weights_of(base)
    model = steer(base, row, "a")
    steer(model, row, "b", layers_to_transform=[1])
    logits(model)
    unloaded = model.unload()
    assert unloaded is base
    assert anatomy(base) == before
    assert base.state_dict().keys() == weights.keys()
    assert_same_weights(base, weights)
    assert torch.equal(logits(base), expected)


@over_cases
def test_merging_survives_saving_or_is_refused_with_nothing_changed(row, family, tmp_path):
    base = tiny_model(family)
    model = steer(base, row)
    weights, expected = weights_of(model), logits(model)
    if family not in ROWS[row].merges:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
            assert_same_weights(model, weights)
            assert torch.equal(logits(model), expected)
        assert not any(layer.merged for layer in layers_of(model))
        return

    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    if not ROWS[row].has_lora:  # whose layers subtract what they have added
        assert_same_weights(model, weights)
        assert torch.equal(logits(model), expected)

    merged = model.merge_and_unload()
    assert not layers_of(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path)), logits(merged))


@over_cases
def test_state_dict_of_an_adapter_can_be_moved_to_another_name(row, family):
    model = steer(tiny_model(family), row, "first", seed=1)
    expected = logits(model)
    steer(model, row, "second", seed=2)
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="first"), adapter_name="second")
    second = parameters_of(model, "second")
    for name, parameter in parameters_of(model, "first").items():
        assert torch.equal(second.pop(name.replace(".first.", ".second.")), parameter)
    assert not second
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
