"""Updates of attention heads merge into the attention's output projection, or are refused with nothing changed."""

from __future__ import annotations

import pytest
import torch
from head_cases import projections
from merged_models import double_model, errors_without_us, loaded_model
from model_zoo import tiny_inputs, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from steering_cases import adapters_of, assert_same_weights, layers_of, logits, steer, weights_of

WIDE = {"head_dim": 12}
BASES = {
    "llama": ("llama", {}),
    "llama with attention_bias": ("llama", {"attention_bias": True}),
    "qwen3": ("qwen3", WIDE),
    "qwen3 with attention_bias": ("qwen3", {**WIDE, "attention_bias": True}),
    "gemma3 with attention_bias": ("gemma3", {"attention_bias": True}),
    **{family: (family, {}) for family in ("qwen2", "gemma3", "gpt2", "opt", "gpt_neox", "falcon", "mixtral")},
}
HAVE_BIAS = {"llama with attention_bias", "qwen3 with attention_bias", "gemma3 with attention_bias"} | {
    *("gpt2", "opt", "gpt_neox")
}
ROWS = ("lofit", "lofit-heads", "lofit-scale", "jola")
CASES = [(base, row) for base in BASES for row in ROWS]
MERGING = [(base, row) for base, row in CASES if base in HAVE_BIAS or row == "lofit-scale"]
REFUSED = [case for case in CASES if case not in MERGING]


@pytest.mark.slow  # that of the sublayer sites takes the same way
def test_merged_models_equal_the_steered_ones_in_a_process_without_trl_steer(tmp_path):
    inputs = {"input_ids": tiny_inputs()["input_ids"]}
    for base, row in MERGING:
        folder = tmp_path / "merged" / f"{base}, {row}"
        loaded = loaded_model(*BASES[base], tmp_path / "bases" / base)
        unsteered = logits(loaded, inputs)
        model = steer(loaded, row, scaling=0.8).double()
        expected = logits(model, inputs)
        assert not torch.allclose(expected, unsteered, atol=1e-3)
        model.merge_and_unload().save_pretrained(folder)
        save_file({**inputs, "logits": expected}, folder / "recorded.safetensors")
    errors = errors_without_us(tmp_path / "merged")
    assert len(errors) == len(MERGING)
    assert {case: error for case, error in errors.items() if error > 1e-10} == {}


@pytest.mark.parametrize(("base", "row"), REFUSED)
def test_an_offset_without_a_bias_to_go_to_is_refused_and_nothing_changes(base, row):
    model = steer(double_model(*BASES[base]), row).double()
    weights, expected = weights_of(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged into .*has no bias") as error:
            merge()
        assert "save_pretrained" in str(error.value)
        assert ("attention_bias=True" in str(error.value)) == (base in ("llama", "qwen3", "gemma3"))
    assert_same_weights(model, weights)
    assert torch.equal(logits(model), expected)
    assert not any(layer.merged for layer in layers_of(model))


def test_the_offset_becomes_a_bias_by_the_weight_before_it_is_scaled():
    base = double_model("gpt2", {})
    (projection, *_), k = projections(base, "gpt2"), 8
    weight, bias = projection.weight.detach().clone().T, projection.bias.detach().clone()  # a `Conv1D`
    model = steer(base, "jola").double()
    adapter = adapters_of(model)[0]
    g1, g2 = (
        torch.clamp(torch.sigmoid(gate) * 1.2 - 0.1, 0, 1).repeat_interleave(k)
        for gate in (adapter.offset_log_gate, adapter.scale_log_gate)
    )
    model.train().merge_and_unload()  # in training, too, gates are those of evaluation
    expected_bias = bias + weight @ (g1 * adapter.offset.flatten())
    torch.testing.assert_close(projection.bias, expected_bias, atol=1e-12, rtol=1e-12)
    expected_weight = weight * (1 + g2 * adapter.scale.flatten())
    torch.testing.assert_close(projection.weight.T, expected_weight, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_unmerging_puts_back_every_bit(family, row):
    model = steer(tiny_model(family), row)
    weights, expected = weights_of(model), logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert_same_weights(model, weights)
    assert torch.equal(logits(model), expected)


def test_active_adapters_merge_together_and_one_after_the_other():
    model = steer(tiny_model("gpt2", dtype=torch.float64), "lofit-scale", "adapter0", seed=0)
    for index, row in enumerate(("lofit", "lofit-heads", "lofit-scale"), 1):
        steer(model, row, f"adapter{index}", seed=index)
    model.double().base_model.set_adapter([f"adapter{index}" for index in range(4)])
    weights, expected = weights_of(model), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    assert_same_weights(model, weights)
    model.merge_adapter(["adapter0"])
    with pytest.raises(ValueError, match="'adapter1' is active in a block where adapter0 is merged"):
        logits(model)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["adapter1", "adapter2", "adapter3"])
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("row", ["lofit", "lofit-scale"])
def test_beside_lora_on_the_projection_nothing_is_merged_that_lora_would_see(row):
    lora = LoraConfig(target_modules=["c_proj"], init_lora_weights=False)
    model = steer(get_peft_model(tiny_model("gpt2"), lora).base_model.model, row)
    weights = weights_of(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert_same_weights(model, weights)


def test_a_bias_that_the_configuration_can_express_is_suggested_and_works(tmp_path):
    model = steer(tiny_model(), "jola")
    expected = logits(model)
    with pytest.raises(ValueError, match="attention_bias=True"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    with_bias = type(base).from_pretrained(tmp_path / "base", attention_bias=True).eval()
    for name, parameter in with_bias.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    merged = PeftModel.from_pretrained(with_bias, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
