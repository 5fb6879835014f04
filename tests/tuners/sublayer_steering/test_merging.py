"""Which updates inside a block merge into the base model, that merged models need nothing of ours, and that the others
are refused with nothing changed."""

from __future__ import annotations

import pytest
import torch
from merged_models import double_model, errors_without_us, loaded_model
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel
from safetensors.torch import save_file
from steering_cases import adapters_of, assert_same_weights, layers_of, logits, steer, weights_of
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

SITES = ("pre_mlp", "post_mlp", "post_attn")
FORMS = ("low_rank", "vector", "silu")
BASES = {
    "llama": ("llama", {}),
    "llama with mlp_bias": ("llama_mlp_bias", {}),
    "llama with attention_bias": ("llama", {"attention_bias": True}),
    **{family: (family, {}) for family in ("qwen2", "gemma3", "gpt2", "opt", "gpt_neox", "phi3")},
    **{family: (family, {}) for family in ("mixtral", "falcon", "starcoder2")},
}
# Low rank goes into matrices, which are everywhere; a vector needs biases that the configuration can express.
BOTH, LOW_RANK, NOTHING = ("low_rank", "vector"), ("low_rank",), ()
MERGES = {
    # base: what merges at each of SITES
    "llama": (LOW_RANK, LOW_RANK, LOW_RANK),
    "llama with mlp_bias": (BOTH, BOTH, LOW_RANK),
    "llama with attention_bias": (LOW_RANK, LOW_RANK, BOTH),
    "qwen2": (LOW_RANK, LOW_RANK, LOW_RANK),
    "gemma3": (LOW_RANK, NOTHING, NOTHING),  # the other two are behind norms
    "gpt2": (BOTH, BOTH, BOTH),
    "opt": (BOTH, BOTH, BOTH),
    "gpt_neox": (BOTH, BOTH, BOTH),
    "phi3": (LOW_RANK, LOW_RANK, LOW_RANK),
    "mixtral": (NOTHING, NOTHING, LOW_RANK),  # a router and experts
    "falcon": (LOW_RANK, LOW_RANK, LOW_RANK),
    "starcoder2": (BOTH, BOTH, BOTH),
}
CASES = [(base, site, form) for base in BASES for site in SITES for form in FORMS]
MERGING = [(base, site, form) for base, site, form in CASES if form in MERGES[base][SITES.index(site)]]
REFUSED = [case for case in CASES if case not in MERGING]


def steered(base: str, site: str, form: str, **fields):
    return steer(double_model(*BASES[base]), f"{site}-{form}", **fields).double()


def test_merged_models_equal_the_steered_ones_in_a_process_without_trl_steer(tmp_path):
    inputs = {"input_ids": tiny_inputs()["input_ids"]}
    for base, site, form in MERGING:
        folder = tmp_path / "merged" / f"{base}, {site}, {form}"
        loaded = loaded_model(*BASES[base], tmp_path / "bases" / base)
        unsteered = logits(loaded, inputs)
        model = steer(loaded, f"{site}-{form}").double()
        expected = logits(model, inputs)
        assert not torch.allclose(expected, unsteered, atol=1e-3)
        model.merge_and_unload().save_pretrained(folder)
        save_file({**inputs, "logits": expected}, folder / "recorded.safetensors")
    errors = errors_without_us(tmp_path / "merged")
    assert len(errors) == len(MERGING)
    assert {case: error for case, error in errors.items() if error > 1e-10} == {}


def reason(base: str, form: str) -> str:
    if form == "silu":
        return "nonlinear"
    if form == "vector" and base != "mixtral":
        return "has no bias"
    return {"gemma3": "a norm, a factor or another layer", "mixtral": "no linear layer was found|has no bias"}[base]


@pytest.mark.parametrize(("base", "site", "form"), REFUSED)
def test_adapter_that_cannot_be_merged_is_refused_with_the_reason_and_nothing_changes(base, site, form):
    model = steered(base, site, form)
    weights, expected = weights_of(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=reason(base, form)) as error:
            merge()
        assert "cannot be merged" in str(error.value)
        assert "save_pretrained" in str(error.value)  # what to do instead
    assert_same_weights(model, weights)
    assert model.state_dict().keys() == weights.keys()
    assert torch.equal(logits(model), expected)
    assert not any(layer.merged for layer in layers_of(model))


@pytest.mark.parametrize(
    ("site", "field"), [("pre_mlp", "mlp_bias"), ("post_mlp", "mlp_bias"), ("post_attn", "attention_bias")]
)
def test_a_bias_that_the_configuration_can_express_is_suggested(site, field, tmp_path):
    model = steer(tiny_model(), f"{site}-vector")
    expected = logits(model)
    with pytest.raises(ValueError, match=f"{field}=True"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    # and following the advice works
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    with_bias = type(base).from_pretrained(tmp_path / "base", **{field: True}).eval()
    for name, parameter in with_bias.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.zeros_(parameter)
    merged = PeftModel.from_pretrained(with_bias, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)


# Taking back


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("form", ["low_rank", "vector"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_unmerging_puts_back_every_bit(family, site, form, safe_merge):
    model = steer(tiny_model(family), f"{site}-{form}")
    weights, expected = weights_of(model), logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert any(not torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert_same_weights(model, weights)
    assert torch.equal(logits(model), expected)
    model.merge_adapter(safe_merge=safe_merge)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model(family)))


@pytest.mark.parametrize("form", ["low_rank", "vector"])
@pytest.mark.parametrize("site", SITES)
def test_broken_weights_do_not_merge_safely(site, form):
    model = steer(tiny_model("gpt2"), f"{site}-{form}")
    next(adapters_of(model)[1].parameters()).data.view(-1)[0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "steering" not in name}
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    assert not any(layer.merged for layer in layers_of(model))


# Several adapters


def several(rows: list[str], **fields):
    """One adapter for each of these rows, all active, on a model where all of them merge."""
    model = None
    for index, row in enumerate(rows):
        model = steer(model or tiny_model("gpt2", dtype=torch.float64), row, f"adapter{index}", seed=index, **fields)
    model.base_model.set_adapter([f"adapter{index}" for index in range(len(rows))])
    return model.double()


@pytest.mark.parametrize(
    "rows",
    [
        *([f"{site}-low_rank", f"{site}-vector", f"{site}-low_rank"] for site in SITES),
        [f"{site}-low_rank" for site in SITES],
        [f"{site}-{form}" for form in BOTH for site in SITES],
    ],
    ids=[*SITES, "a matrix everywhere", "everything"],
)
def test_active_adapters_at_one_and_at_several_sites_merge_at_once(rows):
    model = several(rows, scaling=0.5)
    weights, expected = weights_of(model), logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    assert_same_weights(model, weights)
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-10, rtol=1e-10)


def test_if_one_of_several_adapters_cannot_be_merged_none_is():
    model = several(["pre_mlp-low_rank", "post_mlp-silu", "post_attn-vector"])
    weights, expected = weights_of(model), logits(model)
    with pytest.raises(ValueError, match="'adapter1' cannot be merged"):
        model.merge_adapter()
    assert_same_weights(model, weights)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("site", SITES)
def test_adapters_merged_one_after_the_other_are_those_merged_at_once(site):
    model = several([f"{site}-low_rank", f"{site}-low_rank", f"{site}-vector"])
    weights, expected = weights_of(model), logits(model)
    model.merge_adapter(["adapter0"])
    with pytest.raises(ValueError, match="'adapter1' is active in a block where adapter0 is merged"):
        logits(model)
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["adapter1", "adapter2"])
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)
    model.unmerge_adapter()
    assert_same_weights(model, weights)


def test_a_vector_may_be_merged_beside_another_one():
    model = several(["post_mlp-vector", "post_mlp-vector", "pre_mlp-low_rank"])
    expected = logits(model)
    model.merge_adapter(["adapter0"])
    torch.testing.assert_close(logits(model), expected, atol=1e-10, rtol=1e-10)


def test_a_further_merge_that_fails_leaves_the_first_one_merged():
    model = several(["post_mlp-low_rank", "post_mlp-silu"])
    model.merge_adapter(["adapter0"])
    weights = weights_of(model)
    with (
        pytest.warns(UserWarning, match="additionally merging"),
        pytest.raises(ValueError, match="'adapter1' cannot be merged"),
    ):
        model.merge_adapter(["adapter1"])
    assert_same_weights(model, weights)
    assert all(layer.merged_adapters == ["adapter0"] for layer in layers_of(model))


# 16 bits


@pytest.mark.parametrize("form", ["low_rank", "vector"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_bf16_model_merges_in_its_own_format(family, site, form, tmp_path):
    base = tiny_model(family, dtype=torch.bfloat16)
    model = steer(base, f"{site}-{form}")
    weights, expected = weights_of(model), logits(model)
    unsteered = logits(tiny_model(family, dtype=torch.bfloat16))
    model.merge_adapter()
    merged_error = (logits(model) - expected).float().norm()
    assert merged_error < 0.1 * (expected - unsteered).float().norm() + 0.02 * expected.float().norm()
    model.unmerge_adapter()
    assert_same_weights(model, weights)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path, dtype=torch.bfloat16)), logits(merged))


ENCODER_DECODER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("site", SITES)
def test_the_decoder_of_an_encoder_decoder_model_merges(site, form):
    base = BartForConditionalGeneration(BartConfig(**ENCODER_DECODER)).double().eval()
    model = steer(base, f"{site}-{form}", task_type="SEQ_2_SEQ_LM").double()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-10, rtol=1e-10)


def test_a_model_that_does_not_run_on_tokens_is_not_merged_and_says_so():
    base = WhisperForConditionalGeneration(WhisperConfig(**ENCODER_DECODER)).eval()
    model = steer(base, "post_mlp-low_rank", task_type="SEQ_2_SEQ_LM")
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"merged into WhisperForConditionalGeneration.*input_ids.*save_pretrained"):
        model.merge_and_unload()
    assert_same_weights(model, before)


def test_a_model_that_sets_no_limit_to_its_positions_is_looked_at_and_refused():
    base = XLNetLMHeadModel(XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval()
    model = steer(base, "vector")
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "merges"), [("llama", True), ("gemma3", False)])
def test_outliers_in_the_residual_stream_do_not_hide_a_wrong_merge(family, merges, dtype):
    """As real models have them, hundreds of times the other entries: rounding there is no measure for the others."""
    base = tiny_model(family, dtype=dtype)
    with torch.no_grad():
        base.get_input_embeddings().weight[:, 0] = 500.0
    model = steer(base, "post_mlp-low_rank")
    if merges:
        model.merge_adapter()
        assert all(layer.merged_adapters for layer in layers_of(model))
    else:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter()


def test_an_adapter_with_positions_in_other_blocks_does_not_hinder_a_merge():
    model = steer(tiny_model(), "post_mlp-low_rank", layers_to_transform=[0, 1])
    steer(model, "post_mlp-low_rank", adapter_name="other", layers_to_transform=[2], positions="last_prompt")
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["default"])
    assert layers_of(model)[0].merged_adapters == ["default"]
