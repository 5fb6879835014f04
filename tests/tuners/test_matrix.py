"""Every promise about forward passes, for every tuner, on families of models that differ."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from model_zoo import FAMILIES, NUM_BLOCKS, PAD, tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model
from steering_cases import (
    adapters_of,
    assert_same_weights,
    layers_of,
    logits,
    parameters_of,
    steer,
    steering_config,
    weights_of,
)
from tuner_cases import ROWS, over_cases

STRONG = 8.0  # so that every form of adapter changes some token of a few


@over_cases
def test_fresh_adapter_is_the_base_model_bit_for_bit(row, family):
    base = tiny_model(family)
    expected = logits(base)
    model = steer(base, row, fresh=True)
    assert torch.equal(logits(model), expected) == ROWS[row].starts_at_identity
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@over_cases
def test_random_adapter_differs_and_can_be_disabled(row, family):
    base = tiny_model(family)
    expected = logits(base)
    model = steer(base, row)
    steered = logits(model)
    assert not torch.allclose(steered, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), steered)


@over_cases
def test_paths_of_the_base_model_do_not_change(row, family):
    base = tiny_model(family)
    modules = [name for name, _ in base.named_modules()]
    weights = weights_of(base)
    linear = LoraConfig(target_modules="all-linear")
    lora_targets = get_peft_model(tiny_model(family), copy.deepcopy(linear)).targeted_module_names

    model = steer(base, row)

    layer_name = layers_of(model)[0].layer_name
    blocks = [f"{FAMILIES[family].blocks}.{index}" for index in range(NUM_BLOCKS)]
    assert [block for block in blocks if block in model.targeted_module_names] == blocks
    names = [name for name, _ in base.named_modules()]
    assert [name for name in names if name.endswith(f".{layer_name}")] == [f"{b}.{layer_name}" for b in blocks]
    others = [name for name in names if f".{layer_name}" not in name]
    if ROWS[row].has_lora:  # which wraps linear layers, as PEFT's own does, and leaves them under their paths
        added = {f"{name}.base_layer" for name in modules}
        assert [name for name in others if ".lora_" not in name and name not in added] == modules
        return
    assert others == modules
    assert model.targeted_module_names == blocks
    assert_same_weights(base, weights)
    added = {key for key in base.state_dict() if key not in weights}
    assert added == {name.removeprefix("base_model.model.") for name in parameters_of(model)}
    leaves = f".{layer_name}.steering_adapter.default."
    assert {key.partition(leaves)[0] for key in added} == set(blocks)
    assert get_peft_model(base, linear).targeted_module_names == lora_targets


def _generate(model, **kwargs):
    inputs = tiny_inputs(rows=2, length=5)
    return model.generate(**inputs, **{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs})


@over_cases
def test_greedy_generation_is_the_same_with_and_without_cache(row, family):
    base = tiny_model(family)
    model = steer(base, row, scaling=STRONG)
    without = _generate(model, use_cache=False)
    assert not torch.equal(without, _generate(tiny_model(family)))
    assert torch.equal(_generate(model, use_cache=True, cache_implementation="dynamic"), without)
    if not getattr(base.config, "alibi", False):  # Falcon cannot
        assert torch.equal(_generate(model, use_cache=True, cache_implementation="static"), without)


@over_cases
def test_every_forward_calls_every_adapter_once(row, family):
    model = steer(tiny_model(family), row)
    forwards, calls = [], []
    model.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
    for adapter in adapters_of(model):
        adapter.register_forward_pre_hook(lambda *_: calls.append(1))
    _generate(model)
    assert len(forwards) == 6
    assert len(calls) == NUM_BLOCKS * len(forwards)


@over_cases
def test_beam_search_and_sampling_run_steered(row, family):
    base = tiny_model(family)
    unsteered = _generate(base, num_beams=3)
    model = steer(base, row, scaling=STRONG)
    beams = _generate(model, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams[::2], _generate(model, num_beams=3, use_cache=False))  # the best of each row
    assert not torch.equal(beams[::2], unsteered)
    # among one token, the likeliest, nothing is left to chance
    sampled = _generate(model, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(sampled, _generate(model).repeat_interleave(2, dim=0))


@over_cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_agrees_with_single_prompts_on_real_tokens(row, family, side):
    model = steer(tiny_model(family), row)
    prompts = [tiny_inputs(rows=1, length=length, seed=length)["input_ids"][0] for length in (4, 7, 9)]
    input_ids = torch.full((3, 9), PAD)
    attention_mask = torch.zeros(3, 9, dtype=torch.long)
    real = [slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt)) for prompt in prompts]
    for index, (prompt, place) in enumerate(zip(prompts, real, strict=True)):
        input_ids[index, place] = prompt
        attention_mask[index, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    forward = inspect.signature(type(model.get_base_model()).forward).parameters
    if "position_ids" in forward and family != "qwen2_vl":  # which derives its own from the mask
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    batched = logits(model, inputs)
    for index, (prompt, place) in enumerate(zip(prompts, real, strict=True)):
        single = logits(model, {"input_ids": prompt[None]})[0]
        torch.testing.assert_close(batched[index, place], single, atol=1e-4, rtol=1e-4)


@over_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_models_keep_their_dtype_with_adapters_in_fp32_or_their_own(row, family, dtype):
    base = tiny_model(family, dtype=dtype)
    unsteered = logits(base)
    h_dtypes = set()
    for autocast_adapter_dtype, expected in ((True, torch.float32), (False, dtype)):
        model = copy.deepcopy(base)
        model = get_peft_model(model, steering_config(row), autocast_adapter_dtype=autocast_adapter_dtype).eval()
        assert {parameter.dtype for parameter in parameters_of(model).values()} == {expected}
        for layer in layers_of(model):
            layer.register_forward_hook(lambda _, args, output: h_dtypes.update({args[0].dtype, output.dtype}))
        result = logits(model)
        assert result.dtype == dtype
        assert result.isfinite().all()
        assert not torch.equal(result, unsteered)
    assert h_dtypes == {dtype}


@over_cases
def test_autocast_computes_like_a_16_bit_model(row, family):
    model = steer(tiny_model(family), row)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = logits(model).float()
    # 8 bits of mantissa through three blocks
    assert 0 < (result - expected).norm() < 0.1 * expected.norm()


@over_cases
def test_deep_copies_are_independent(row, family):
    model = steer(tiny_model(family), row)
    expected = logits(model)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), expected)
    for parameter in parameters_of(clone).values():
        parameter.data.add_(1)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(clone), expected)
    # and taking the copy apart leaves the original whole
    assert torch.equal(logits(clone.unload()), logits(tiny_model(family)))
    assert torch.equal(logits(model), expected)
