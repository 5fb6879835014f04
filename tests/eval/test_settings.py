"""The settings of a run: those of version 0.1 are still the same, and presets are read the same everywhere."""

from dataclasses import replace

import pytest

from trl_steer import PostBlockSteeringConfig, presets
from trl_steer.eval import training
from trl_steer.eval.demo import preset
from trl_steer.eval.settings import Settings, of_preset, with_rate

# As version 0.1 wrote them.
LOW_RANK_SEED_0 = {
    "format": "trl_steer run 1",
    "method": "low_rank",
    "model": "embedded",
    "benchmark": "listops_synthetic",
    "source": {"seed": 0, "train": 480, "validation": 0, "test": 200, "min_tokens": 4, "max_tokens": 12},
    "task": "steer_listops_synthetic",
    "seed": 0,
    "r": 8,
    "training": {
        "max_length": None,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "num_train_epochs": 1.0,
    },
    "scoring": {"batch_size": 50, "gen_kwargs": {"max_gen_toks": 18}},
    "steering": {},
}


def test_settings_of_the_demo_are_those_of_version_0_1():
    assert preset.settings().to_dict() == LOW_RANK_SEED_0
    loreft = preset.settings("loreft").to_dict()
    assert loreft["steering"] == {"site": "post_block", "positions": "all"}
    assert all(preset.settings(method).to_dict().keys() == LOW_RANK_SEED_0.keys() for method in presets.METHODS)


@pytest.mark.parametrize("changed", [{}, {"lora": {"lora_alpha": 32}}, {"dtype": "bfloat16", "keep_weights": False}])
def test_settings_are_read_back_from_what_is_written(changed):
    settings = replace(preset.settings("lora", seed=3), **changed)
    written = settings.to_dict()
    assert Settings.from_dict(written) == settings
    assert written.keys() - LOW_RANK_SEED_0.keys() == changed.keys()


def test_values_of_a_preset_are_in_their_places():
    lora = of_preset("paper", "lora", "gsm8k")
    assert (lora["r"], lora["lora"], lora["steering"]) == (8, {"target_modules": presets.SEVEN_MODULES}, {})
    assert (lora["training"]["num_train_epochs"], lora["training"]["warmup_steps"]) == (3.0, 0.03)
    assert lora["training"].keys().isdisjoint({"lora_r", "lora_alpha", "lora_target_modules"})
    steering = of_preset("paper", "low_rank", "alpaca")
    assert (steering["r"], steering["steering"], steering["training"]["max_length"]) == (16, {"init_scale": 1e-3}, 512)
    joint = of_preset("paper", "joint_orth", "boolq")
    assert joint["steering"] == {"init_scale": 1e-3}
    assert joint["training"]["steering_learning_rate"] == 2e-4
    loreft = of_preset("paper", "loreft", "boolq")
    assert loreft["steering"] == {"site": "post_mlp", "positions": "last_prompt"}


def test_values_that_are_left_out_are_the_defaults():
    values = presets.settings("default", "joint", "boolq").values
    lora, joint = (training.peft_config(preset.settings(method)) for method in ("lora", "joint"))
    assert of_preset("default", "joint", "boolq")["lora"] == of_preset("default", "joint", "boolq")["steering"] == {}
    for config in (lora, joint):
        assert (values["lora_alpha"], values["lora_dropout"]) == (config.lora_alpha, config.lora_dropout)
    assert values["lora_target_modules"] == lora.target_modules
    assert values["steering_init_scale"] == PostBlockSteeringConfig().init_scale


def test_a_rate_scales_the_rates_of_both_halves():
    before = {"learning_rate": 1e-3, "steering_learning_rate": 2e-3, "weight_decay": 0.0}
    assert with_rate(before, 5e-4) == {"learning_rate": 5e-4, "steering_learning_rate": 1e-3, "weight_decay": 0.0}
    assert with_rate(before, 1e-3) == before


def test_loras_settings_reach_the_adapter():
    lora = {"lora_alpha": 32, "use_rslora": True, "target_modules": ["q_proj"]}
    config = training.peft_config(replace(preset.settings("lora"), r=16, lora=lora))
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (16, 32, True, {"q_proj"})
    joint = training.peft_config(replace(preset.settings("joint"), steering={"r": 64}))
    assert (joint.r, joint.steering["r"]) == (8, 64)
    assert training.peft_config(preset.settings("full")) is None
