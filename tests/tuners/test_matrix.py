"""Every promise about forward passes, on every family of models, for every kind of adapter."""

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
    over_families,
    over_kinds,
    steer,
    steering_config,
    update_of,
    weights_of,
)


@over_kinds
@over_families
def test_fresh_adapter_is_the_base_model_bit_for_bit(family, kind):
    base = tiny_model(family)
    expected = logits(base)
    assert torch.equal(logits(steer(base, kind, init_weights=True)), expected)


@over_kinds
@over_families
def test_random_adapter_differs_and_can_be_disabled(family, kind):
    base = tiny_model(family)
    expected = logits(base)
    model = steer(base, kind)
    steered = logits(model)
    assert not torch.allclose(steered, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), steered)


@over_kinds
@over_families
@pytest.mark.parametrize("captured_before", [True, False])
def test_hidden_states_are_the_steered_ones(family, kind, captured_before):
    model = tiny_model(family)
    with torch.no_grad():
        if captured_before:
            unsteered = model(**tiny_inputs(), output_hidden_states=True).hidden_states
        model = steer(model, kind)
        inputs_of_layers = {}
        for index, layer in enumerate(layers_of(model)):
            layer.register_forward_pre_hook(lambda _, args, index=index: inputs_of_layers.update({index: args[0]}))
        hidden_states = model(**tiny_inputs(), output_hidden_states=True).hidden_states
        assert len(hidden_states) == NUM_BLOCKS + 1
        # the last one is what the final norm makes of it
        for index in range(NUM_BLOCKS - 1):
            h = inputs_of_layers[index]
            expected = h + update_of(adapters_of(model)[index], h)
            torch.testing.assert_close(hidden_states[index + 1], expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(hidden_states[index + 1], h, atol=1e-3)
        if captured_before:
            assert torch.equal(hidden_states[0], unsteered[0])
            assert not torch.allclose(hidden_states[-1], unsteered[-1], atol=1e-3)


@over_families
def test_paths_of_the_base_model_do_not_change(family):
    base = tiny_model(family)
    modules = [name for name, _ in base.named_modules()]
    weights = weights_of(base)
    linear = LoraConfig(target_modules="all-linear")
    lora_targets = get_peft_model(tiny_model(family), copy.deepcopy(linear)).targeted_module_names

    model = steer(base)

    steered_blocks = [f"{FAMILIES[family].blocks}.{index}" for index in range(NUM_BLOCKS)]
    assert model.targeted_module_names == steered_blocks
    names = [name for name, _ in base.named_modules()]
    assert [name for name in names if ".post_block_steering" not in name] == modules
    assert [name for name in names if name.endswith(".post_block_steering")] == [
        f"{block}.post_block_steering" for block in steered_blocks
    ]
    assert_same_weights(base, weights)
    added = {key for key in base.state_dict() if key not in weights}
    assert added == {
        f"{block}.post_block_steering.steering_adapter.default.{leaf}"
        for block in steered_blocks
        for leaf in ("down", "up")
    }
    assert get_peft_model(base, linear).targeted_module_names == lora_targets


def _generate(model, **kwargs):
    inputs = tiny_inputs(rows=2, length=5)
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)


@over_kinds
@over_families
def test_greedy_generation_is_the_same_with_and_without_cache(family, kind):
    base = tiny_model(family)
    model = steer(base, kind)
    without = _generate(model, use_cache=False)
    assert without.shape == (2, 11)
    assert torch.equal(_generate(model, use_cache=True, cache_implementation="dynamic"), without)
    if base._can_compile_fullgraph and not getattr(base.config, "alibi", False):  # Falcon cannot
        assert torch.equal(_generate(model, use_cache=True, cache_implementation="static"), without)


@over_kinds
@over_families
def test_every_forward_calls_every_adapter_once(family, kind):
    model = steer(tiny_model(family), kind)
    forwards, calls = [], []
    model.get_base_model().register_forward_pre_hook(lambda *_: forwards.append(1))
    for adapter in adapters_of(model):
        adapter.register_forward_pre_hook(lambda *_: calls.append(1))
    _generate(model)
    assert len(forwards) == 6
    assert len(calls) == NUM_BLOCKS * len(forwards)


@over_families
def test_beam_search_and_sampling_run_steered(family):
    base = tiny_model(family)
    arguments = {**tiny_inputs(length=5), "max_new_tokens": 6, "min_new_tokens": 6}
    unsteered = base.generate(**arguments, num_beams=3, do_sample=False)
    model = steer(base)
    beams = model.generate(**arguments, num_beams=3, num_return_sequences=2, do_sample=False)
    assert beams.shape == (4, 11)
    assert not torch.equal(beams[::2], unsteered)
    assert model.generate(**arguments, do_sample=True, num_return_sequences=2).shape == (4, 11)


@over_kinds
@over_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_agrees_with_single_prompts_on_real_tokens(family, kind, side):
    model = steer(tiny_model(family), kind)
    prompts = [tiny_inputs(rows=1, length=length, seed=length)["input_ids"][0] for length in (4, 7, 9)]
    input_ids = torch.full((3, 9), PAD)
    attention_mask = torch.zeros(3, 9, dtype=torch.long)
    real = [slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt)) for prompt in prompts]
    for row, (prompt, place) in enumerate(zip(prompts, real, strict=True)):
        input_ids[row, place] = prompt
        attention_mask[row, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    forward = inspect.signature(type(model.get_base_model()).forward).parameters
    if "position_ids" in forward and family != "qwen2_vl":  # which derives its own from the mask
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    batched = logits(model, inputs)
    for row, (prompt, place) in enumerate(zip(prompts, real, strict=True)):
        single = logits(model, {"input_ids": prompt[None]})[0]
        torch.testing.assert_close(batched[row, place], single, atol=1e-4, rtol=1e-4)


@over_kinds
@over_families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_models_keep_their_dtype_with_adapters_in_fp32_or_their_own(family, kind, dtype):
    base = tiny_model(family, dtype=dtype)
    h_dtypes = set()
    for autocast_adapter_dtype, expected in ((True, torch.float32), (False, dtype)):
        model = copy.deepcopy(base)
        model = get_peft_model(model, steering_config(kind), autocast_adapter_dtype=autocast_adapter_dtype).eval()
        assert {p.dtype for adapter in adapters_of(model) for p in adapter.parameters()} == {expected}
        for layer in layers_of(model):
            layer.register_forward_hook(lambda _, args, output: h_dtypes.update({args[0].dtype, output.dtype}))
        result = logits(model)
        assert result.isfinite().all()
        assert not torch.equal(result, logits(base))
    assert h_dtypes == {dtype}


@over_kinds
@over_families
def test_autocast_computes_like_a_16_bit_model(family, kind):
    model = steer(tiny_model(family), kind)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = logits(model).float()
    assert result.isfinite().all()
    # 8 bits of mantissa through three blocks
    assert (result - expected).norm() < 0.1 * expected.norm()


@over_kinds
@over_families
def test_deep_copies_are_independent(family, kind):
    model = steer(tiny_model(family), kind)
    expected = logits(model)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), expected)
    for adapter in adapters_of(clone):
        for parameter in adapter.parameters():
            parameter.data.add_(1)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(clone), expected)
    # and taking the copy apart leaves the original whole
    assert torch.equal(logits(clone.unload()), logits(tiny_model(family)))
    assert torch.equal(logits(model), expected)
