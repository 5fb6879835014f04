import json

import pytest
from peft import LoraConfig, PeftConfig

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig


def test_lora_options_stay_at_the_top_and_steering_is_a_complete_plain_dictionary():
    config = JointSteeringConfig(r=4, lora_alpha=7, use_rslora=True, steering={"r": 2, "activation": "silu"})
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 7, True)
    assert config.steering["r"] == 2
    assert config.steering["steering_type"] == "low_rank"
    json.dumps(config.steering)


def test_from_parts_round_trips():
    lora = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    steering = PostBlockSteeringConfig(r=2, scaling=0.5, layers_to_transform=[0, 2], task_type="CAUSAL_LM")
    config = JointSteeringConfig.from_parts(lora, steering)
    assert config.lora_config().to_dict() == lora.to_dict()
    assert config.steering_config().to_dict() == steering.to_dict()


def test_saved_configuration_reads_back_equal(tmp_path):
    config = JointSteeringConfig(r=4, target_modules=["q_proj"], steering={"steering_type": "vector"})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is JointSteeringConfig
    assert loaded.to_dict() == config.to_dict()


def test_modules_to_save_of_either_half_belong_to_the_whole():
    config = JointSteeringConfig.from_parts(LoraConfig(), PostBlockSteeringConfig(modules_to_save=["lm_head"]))
    assert config.modules_to_save == ["lm_head"]
    with pytest.raises(ValueError, match="different"):
        JointSteeringConfig.from_parts(
            LoraConfig(modules_to_save=["score"]), PostBlockSteeringConfig(modules_to_save=["lm_head"])
        )


def test_the_task_and_the_base_model_of_either_half_belong_to_the_whole():
    steering = PostBlockSteeringConfig(task_type="CAUSAL_LM", base_model_name_or_path="base")
    config = JointSteeringConfig.from_parts(LoraConfig(), steering)
    assert (config.task_type, config.base_model_name_or_path) == ("CAUSAL_LM", "base")
    with pytest.raises(ValueError, match="different"):
        JointSteeringConfig.from_parts(LoraConfig(task_type="SEQ_CLS"), steering)


@pytest.mark.parametrize("lora", [PostBlockSteeringConfig(), JointSteeringConfig(steering={"r": 4}), None])
def test_only_a_lora_configuration_can_be_the_lora_half(lora):
    with pytest.raises(TypeError, match="lora must be a LoraConfig"):
        JointSteeringConfig.from_parts(lora)


@pytest.mark.parametrize(
    ("steering", "error", "message"),
    [
        ({"rank": 2}, ValueError, r"unknown fields \['rank'\]"),
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"steering_type": "vector", "activation": "silu"}, ValueError, "cannot be used with"),
        ([8], TypeError, r"got \[8\] of type list"),
    ],
)
def test_wrong_steering_halves_are_refused_with_what_is_allowed(steering, error, message):
    with pytest.raises(error, match=message):
        JointSteeringConfig(steering=steering)
