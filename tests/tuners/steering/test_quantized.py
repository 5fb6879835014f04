"""Steering 8-bit and 4-bit bases of bitsandbytes, on its CPU backend."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from steering_cases import (
    KINDS,
    adapters_of,
    assert_same_weights,
    layers_of,
    logits,
    steer,
    steering_config,
    weights_of,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")

BITS = {
    "8-bit": {"load_in_8bit": True},
    "4-bit fp32": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4-bit bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}
# Wide enough for bitsandbytes, whose blocks hold 64 weights.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
QUANTIZED_FAMILIES = {"llama": WIDE, "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}}

over_bits = pytest.mark.parametrize("bits", BITS)
over_quantized_families = pytest.mark.parametrize("family", QUANTIZED_FAMILIES)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Loads a family in so many bits, always the same weights."""
    root = tmp_path_factory.mktemp("bases")
    for family, fields in QUANTIZED_FAMILIES.items():
        tiny_model(family, **fields).save_pretrained(root / family)

    def load(family: str, bits: str):
        config = BitsAndBytesConfig(**BITS[bits])
        dtype = torch.bfloat16 if "bf16" in bits else torch.float32
        return AutoModelForCausalLM.from_pretrained(root / family, quantization_config=config, dtype=dtype)

    return load


over_kinds = pytest.mark.parametrize("kind", [*KINDS, "post_mlp-silu", "loreft", "lofit-heads", "jola"])


@pytest.fixture
def weights_stay_as_loaded(monkeypatch):
    """On processors with AVX512-BF16, bitsandbytes repacks and rounds 4-bit weights when they are first used."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@over_kinds
@over_bits
@over_quantized_families
def test_adapter_is_floating_point_and_output_keeps_the_dtype_of_the_block(quantized, family, bits, kind):
    base = quantized(family, bits)
    assert any(not parameter.is_floating_point() for parameter in base.parameters())  # it is quantized
    unsteered = logits(base)
    model = steer(base, kind)
    assert {p.dtype for adapter in adapters_of(model) for p in adapter.parameters()} == {torch.float32}
    dtypes = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda _, args, output: dtypes.append((args[0].dtype, output.dtype)))
    steered = logits(model)
    assert all(before == after for before, after in dtypes)
    assert dtypes
    assert not torch.allclose(steered, unsteered, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), unsteered)
    assert torch.equal(logits(model.unload()), unsteered)


@over_bits
@over_quantized_families
def test_adapter_without_autocast_takes_the_floating_point_format_of_the_block(quantized, family, bits):
    model = quantized(family, bits)
    model = get_peft_model(model, steering_config(), autocast_adapter_dtype=False)
    expected = torch.bfloat16 if "bf16" in bits else torch.float32
    assert {p.dtype for adapter in adapters_of(model) for p in adapter.parameters()} == {expected}


@over_kinds
@over_bits
@over_quantized_families
def test_quantized_models_train(quantized, family, bits, kind):
    model = steer(prepare_model_for_kbit_training(quantized(family, bits)), kind).train()
    inputs = tiny_inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".steering_adapter." in name for name in gradients)
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients.values())


@over_kinds
@over_bits
def test_quantized_models_generate_save_and_load(quantized, bits, kind, tmp_path):
    model = steer(quantized("llama", bits), kind)
    expected = logits(model)
    tokens = model.generate(**tiny_inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(quantized("llama", bits), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), expected)
    assert torch.equal(loaded.generate(**tiny_inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False), tokens)


@pytest.mark.usefixtures("weights_stay_as_loaded")
@over_bits
def test_vector_merges_where_the_quantized_layer_has_a_bias(quantized, bits, tmp_path):
    model = steer(quantized("opt", bits), "vector")
    before, expected = weights_of(model), logits(model)
    tolerance = 1e-1 if "bf16" in bits else 1e-3
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=tolerance, rtol=tolerance)
    model.unmerge_adapter()
    assert_same_weights(model, before)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.usefixtures("weights_stay_as_loaded")
@over_bits
def test_vector_is_not_merged_where_the_quantized_layer_has_no_bias(quantized, bits):
    model = steer(quantized("llama", bits), "vector")
    before, expected = weights_of(model), logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert_same_weights(model, before)
    assert torch.equal(logits(model), expected)
