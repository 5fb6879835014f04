"""`rank_pattern`: blocks with adapters of different ranks."""

import pytest
import torch
from model_zoo import tiny_model
from peft import PeftModel
from steering_cases import adapters_of, logits, steer

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig, SublayerSteeringConfig, hotswap_adapter
from trl_steer.tuners.joint_steering.folders import join_adapters, split_adapter

PATTERN = {"layers.0": 1, r"layers\.[2-9]": 5}


def ranks(model, adapter_name="default") -> list[int]:
    return [len(adapter.down) for adapter in adapters_of(model, adapter_name)]


@pytest.mark.parametrize("row", ["low_rank", "silu", "post_mlp-low_rank"])
def test_each_block_has_its_rank_and_is_saved_and_loaded(row, tmp_path):
    model = steer(tiny_model(), row, rank_pattern=PATTERN)
    assert ranks(model) == [1, 3, 5]
    model.save_pretrained(tmp_path)
    assert "1 to 5, by block" in (tmp_path / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_sums_are_exact():
    model = steer(tiny_model(), rank_pattern=PATTERN)
    steer(model, adapter_name="other", seed=1)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum")
    h = torch.randn(4, 32)
    for one, two, both in zip(*(adapters_of(model, name) for name in ("default", "other", "sum")), strict=True):
        torch.testing.assert_close(both(h) - h, 0.7 * (one(h) - h) - 0.4 * (two(h) - h), rtol=1e-4, atol=1e-4)


def test_hot_swap_needs_the_same_ranks(tmp_path):
    steer(tiny_model(), rank_pattern=PATTERN, seed=1).save_pretrained(tmp_path)
    model = steer(tiny_model(), rank_pattern=PATTERN)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(tiny_model(), tmp_path)))
    with pytest.raises(ValueError, match="rank_pattern"):
        hotswap_adapter(steer(tiny_model()), tmp_path)


def test_a_joint_adapter_can_be_split_and_joined(tmp_path):
    model = steer(tiny_model(), "joint-low_rank", rank_pattern=PATTERN)
    assert isinstance(model.peft_config["default"], JointSteeringConfig)
    assert ranks(model) == [1, 3, 5]
    model.save_pretrained(tmp_path / "joint")
    split_adapter(tmp_path / "joint", tmp_path / "lora", tmp_path / "steering")
    join_adapters(tmp_path / "lora", tmp_path / "steering", tmp_path / "again")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "again")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("config_cls", [PostBlockSteeringConfig, SublayerSteeringConfig])
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank_pattern": {"layers.0": 0}}, ValueError, "rank_pattern must be at least 1, got 0"),
        ({"rank_pattern": {"layers.0": "2"}}, TypeError, "rank_pattern must be an integer"),
        ({"rank_pattern": {0: 2}}, TypeError, "a dictionary from names of blocks to ranks"),
        ({"rank_pattern": [2]}, TypeError, "a dictionary from names of blocks to ranks"),
        ({"rank_pattern": {"layers.0": 2}, "steering_type": "vector"}, ValueError, "cannot be used with"),
    ],
)
def test_invalid_patterns_are_refused(config_cls, fields, error, message):
    with pytest.raises(error, match=message):
        config_cls(**fields)
