"""Drift equals a direct computation from the logits of the adapted and of the base model."""

import numpy as np
import pytest
import torch
from analysis_cases import BATCHINGS, TEXTS, adapted_model, batches, double_model, with_adapter
from peft import IA3Config, LoraConfig
from tuner_cases import ROWS

from trl_steer import adapter_scaling
from trl_steer.analysis import drift, scaled


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits(model):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([text])).logits[0].numpy() for text in TEXTS]


def direct_drift(base, adapted):
    divergences, agreements, losses = [], [], []
    for text, p, q in zip(TEXTS, map(log_softmax, base), map(log_softmax, adapted), strict=True):
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        agreements.append(p.argmax(-1) == q.argmax(-1))
        losses.append(-q[np.arange(len(text) - 1), text[1:]])
    mean = [np.concatenate(values).mean() for values in (divergences, agreements, losses)]
    return {"kl": mean[0], "agreement": mean[1], "perplexity": np.exp(mean[2])}


@pytest.mark.parametrize("name", BATCHINGS)
def test_drift_is_that_of_the_logits(name):
    model = adapted_model("low_rank")
    base = logits(double_model())
    found = drift(model, batches(name), scalings=(0.0, 0.5, 1.0))
    assert found["tokens"] == 44
    for row in found["scalings"]:
        with adapter_scaling(model, "default", row["scaling"]):
            direct = direct_drift(base, logits(model))
        assert {key: row[key] for key in direct} == pytest.approx(direct, abs=1e-8)
    assert found["base_perplexity"] == pytest.approx(direct_drift(base, base)["perplexity"], abs=1e-8)
    assert found["scalings"][0]["kl"] == 0


@pytest.mark.parametrize("row", ROWS)
def test_every_adapter_drifts_further_with_its_scaling_and_starts_at_the_base(row):
    found = drift(adapted_model(row, "gemma3"), batches("left"), scalings=(0.0, 0.1, 1.0))
    none, some, all_ = (each["kl"] for each in found["scalings"])
    assert none == pytest.approx(0, abs=1e-12)
    assert 0 < some < all_


def test_lora_of_peft_is_scaled():
    model = with_adapter(double_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    base, plain = logits(double_model()), logits(model)
    found = drift(model, batches(), scalings=(1.0, 2.0))
    assert found["scalings"][0]["kl"] == pytest.approx(direct_drift(base, plain)["kl"], abs=1e-8)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.scaling["default"] *= 2
    assert found["scalings"][1]["kl"] == pytest.approx(direct_drift(base, logits(model))["kl"], abs=1e-8)


def test_scaling_multiplies_the_scaling_that_the_adapter_was_saved_with():
    model = adapted_model("vector", scaling=0.5)
    with scaled(model, 2.0):
        twice = logits(model)
    with adapter_scaling(model, "default", 1.0):
        for ours, theirs in zip(twice, logits(model), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_adapters_that_cannot_be_scaled_and_missing_texts_are_errors():
    other = with_adapter(double_model(), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="cannot be scaled"):
        drift(other, batches())
    with pytest.raises(ValueError, match="no prompts"):
        drift(adapted_model("low_rank"), [])


def test_texts_of_one_token_have_no_perplexity():
    found = drift(adapted_model("vector"), [{"input_ids": torch.tensor([[5], [6]])}], scalings=(1.0,))
    assert found["tokens"] == 2
    assert found["base_perplexity"] is None
    assert found["scalings"][0]["perplexity"] is None
