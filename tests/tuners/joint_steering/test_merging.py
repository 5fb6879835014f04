"""Merging a joint adapter is all or nothing, and knows what stands around the blocks."""

import copy

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import get_peft_model

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig

VECTOR = {"steering_type": "vector", "init_weights": False}
MERGES = ["merge_adapter", "merge_and_unload"]


def joint_model(**fields):
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **fields}
    config = JointSteeringConfig(steering=VECTOR, task_type="CAUSAL_LM", **fields)
    return get_peft_model(tiny_model("llama_mlp_bias"), config).eval()


def logits(model):
    with torch.no_grad():
        return model(**tiny_inputs()).logits


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        # After `q_proj` of the first block has taken its product, for want of a bias.
        ({"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}, "base layer has no bias"),
        ({"alora_invocation_tokens": [5]}, "aLoRA does not support merging"),
    ],
    ids=["in the middle", "at once"],
)
def test_if_lora_cannot_be_merged_nothing_is(lora, message, merge):
    model = joint_model(**lora)
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        getattr(model, merge)()
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in state.items())
    assert torch.equal(logits(model), expected)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("merge", MERGES)
def test_a_broken_layer_after_whole_ones_leaves_none_merged(merge):
    model = joint_model(target_modules=["q_proj", "down_proj", "lm_head"])
    broken = model.get_base_model().lm_head.lora_B["default"].weight
    with torch.no_grad():
        broken[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, merge)(safe_merge=True)
    after = model.state_dict()
    torch.testing.assert_close(dict(after), dict(before), atol=1e-6, rtol=1e-5, equal_nan=True)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["embed_tokens", "down_proj"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_merged_model_computes_the_same(fields, merge):
    model = joint_model(**fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(model)
    merged = getattr(model, merge)()
    torch.testing.assert_close(logits(merged or model), expected, atol=1e-4, rtol=1e-4)
    if merge == "merge_adapter":
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_merging_goes_on_where_it_has_begun():
    model = joint_model()
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merge", MERGES)
def test_merging_into_replicated_blocks_is_refused(merge):
    model = joint_model(layer_replication=[(0, 2), (1, 3)])
    expected = logits(model)
    with pytest.raises(ValueError, match="replicated blocks"):
        getattr(model, merge)()
    assert torch.equal(logits(model), expected)


def test_merging_into_a_bias_that_two_blocks_share_is_refused():
    base = tiny_model("llama_mlp_bias")
    base.model.layers[1].mlp.down_proj.bias = base.model.layers[0].mlp.down_proj.bias
    model = get_peft_model(base, PostBlockSteeringConfig(**VECTOR)).eval()
    expected = logits(model)
    with pytest.raises(ValueError, match="shared with other layers"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)


def test_merging_leaves_the_modes_of_the_modules_as_they_were():
    model = joint_model().train()
    model.get_base_model().model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    model.merge_adapter()
    assert [module.training for module in model.modules()] == modes
