"""Adapters whose weights are computed from others: pruned ones, and those with a parametrization."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel
from steering_cases import adapters_of, logits, over_kinds, steer
from torch.nn.utils import parametrizations, parametrize, prune


def tensor_name(kind):
    return "vector" if kind == "vector" else "up"


def pruned(adapter, name):
    prune.l1_unstructured(adapter, name, amount=0.5)


def normed(adapter, name):
    parametrizations.weight_norm(adapter, name, dim=0)


def made_permanent(adapter, name):
    if parametrize.is_parametrized(adapter):
        parametrize.remove_parametrizations(adapter, name)
    else:
        prune.remove(adapter, name)


@over_kinds
@pytest.mark.parametrize("replace", [pruned, normed])
def test_computed_weights_train_and_are_saved_once_made_permanent(replace, kind, tmp_path):
    model = steer(tiny_model(), kind)
    for adapter in adapters_of(model):
        replace(adapter, tensor_name(kind))
    before = logits(model)
    inputs = tiny_inputs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    trained = logits(model.eval())
    assert not torch.equal(trained, before)

    with pytest.raises(ValueError, match=r"(?s)was not saved.*prune\.remove.*remove_parametrizations"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    for adapter in adapters_of(model):
        made_permanent(adapter, tensor_name(kind))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), trained, atol=1e-6, rtol=1e-5)
