"""The presets against a table written from their sources, not from the code."""

from typing import get_args, get_type_hints

import pytest

from trl_steer import LoReftConfig, PostBlockSteeringConfig, SublayerSteeringConfig, presets
from trl_steer.presets import METHODS, PRESETS, settings

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PLAIN_ADAMW = {"optim": "adamw_torch_fused", "weight_decay": 0.0}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0.0}

# The paper, appendix F.5: AdamW, batch 8, one epoch (GSM8K three); steering without decay, warm-up or scheduler; SFT
# and LoRA with a cosine and a warm-up.
PAPER = {
    "low_rank": {**CONSTANT, "learning_rate": 2e-3, "steering_init_scale": 1e-3},
    "vector": {**CONSTANT, "learning_rate": 5e-3, "steering_init_scale": 1e-3},
    "sublayer": {**CONSTANT, "learning_rate": 2e-3, "steering_init_scale": 1e-3, "site": "post_mlp"},
    "loreft": {**CONSTANT, "learning_rate": 2e-3, "site": "post_mlp", "positions": "last_prompt"},
    "lofit": {**CONSTANT, "learning_rate": 2e-3},
    "jola": {**CONSTANT, "learning_rate": 2e-3},
    "lora": {"lr_scheduler_type": "cosine", "learning_rate": 3e-4, "lora_r": 8},
    "full": {"lr_scheduler_type": "cosine", "learning_rate": 2e-5},
}
# The authors' code: rate 9e-4, linear, warm-up 0.03, no decay, batch 8 x 2, fp32 without autocast, no end token; joint
# at 2e-4 for both halves, cosine, warm-up 0.06, LoRA r=8, alpha 8, no dropout, seven modules.
STEERLING = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "bf16": False,
    "fp16": False,
    "train_end_token": False,
    "task_splits": "steerling",
}
STEERLING_ALONE = {"learning_rate": 9e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.03}
STEERLING_JOINT = {
    "learning_rate": 2e-4,
    "steering_learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.06,
    "lora_r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": SEVEN,
    "steering_init_scale": 1e-3,
}
STEERLING_PROJECTION = {
    "orthogonal_side": "input",
    "orthogonal_every": 100,
    "orthogonal_before_step": True,
    "orthogonal_at_end": False,
    "orthogonal_gradients": False,
    "orthogonal_norms": False,
}


def subset(values: dict, wanted: dict) -> dict:
    return {name: values.get(name) for name in wanted}


@pytest.mark.parametrize("method", PAPER)
@pytest.mark.parametrize(("task", "epochs"), [("boolq", 1), ("listops", 1), ("gsm8k", 3)])
def test_preset_paper_equals_appendix_f(method, task, epochs):
    wanted = {**PLAIN_ADAMW, **PAPER[method], "per_device_train_batch_size": 8, "num_train_epochs": epochs}
    values, guessed = settings("paper", method, task)
    assert subset(values, wanted) == wanted
    assert "learning_rate" in guessed  # the tables of rates are lost


def test_preset_paper_tunes_instructions_at_one_rate_and_rank_16():
    wanted = {"learning_rate": 2e-3, "steering_r": 16, "num_train_epochs": 3, "max_length": 512}
    values, guessed = settings("paper", "low_rank", "alpaca")
    assert subset(values, wanted) == wanted
    assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] == 16
    assert "learning_rate" not in guessed


@pytest.mark.parametrize("method", ["low_rank", "vector", "sublayer"])
@pytest.mark.parametrize(
    ("task", "length", "epochs"),
    [("boolq", 256, 1), ("arc_challenge", 256, 1), ("gsm8k", 256, 3), ("aqua", 512, 1), ("listops", 512, 1)],
)
def test_preset_steerling_equals_the_authors_code(method, task, length, epochs):
    wanted = {**PLAIN_ADAMW, **STEERLING, **STEERLING_ALONE, "max_length": length, "num_train_epochs": epochs}
    values, guessed = settings("steerling", method, task)
    assert subset(values, wanted) == wanted
    assert values["steering_init_scale"] == 1e-3
    assert not guessed


def test_preset_steerling_projects_as_the_authors_code_does():
    joint = settings("steerling", "joint", "gsm8k").values
    assert subset(joint, {**STEERLING, **STEERLING_JOINT}) == {**STEERLING, **STEERLING_JOINT}
    assert not any(name.startswith("orthogonal") for name in joint)
    assert settings("steerling", "joint_orth", "gsm8k").values == {**joint, **STEERLING_PROJECTION}


def test_preset_steerling_tunes_instructions_in_bf16_with_a_cosine():
    wanted = {"bf16": True, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_length": 512}
    assert subset(settings("steerling", "low_rank", "alpaca").values, wanted) == wanted


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        *[("low_rank", 2e-3), ("vector", 1e-2), ("lora", 1e-3), ("joint_orth", 1e-3), ("full", 1e-4)],
        *[("loreft", 5e-4), ("lofit", 1e-2), ("jola", 5e-3)],
    ],
)
def test_preset_default_equals_the_settings_of_the_demo(method, rate):
    wanted = {"learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "num_train_epochs": 1}
    assert subset(settings("default", method, "listops").values, wanted) == wanted
    if method == "joint_orth":
        assert settings("default", method).values["steering_learning_rate"] == 2e-3


@pytest.mark.parametrize("method", ["loreft", "lofit", "jola", "lora", "full"])
def test_settings_missing_in_the_authors_code_are_marked_as_guessed(method):
    assert "learning_rate" in settings("steerling", method, "boolq").guessed


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_guessed_settings_have_values(preset, method):
    for task in (None, "gsm8k", "alpaca"):
        values, guessed = settings(preset, method, task)
        assert guessed.keys() <= values.keys()
        assert ("num_train_epochs" in values) == (task is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("papr", "low_rank"), "papr"),
        (("paper", "lowrank"), "lowrank"),
        (("paper", "joint", None, "matrix"), "matrix"),
    ],
)
def test_unknown_preset_method_or_task_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        settings(*arguments)


def test_names_are_written_twice_for_the_type_checker_and_are_the_same():
    assert tuple(METHODS) == get_args(presets.Method)
    assert tuple(PRESETS) == get_args(presets.Preset)
    for method, config_class in (("sublayer", SublayerSteeringConfig), ("loreft", LoReftConfig)):
        assert presets.SITES[method] == get_args(get_type_hints(config_class)["site"])
    assert get_args(get_type_hints(PostBlockSteeringConfig)["steering_type"]) == presets.STEERING_TYPES


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"sublayer", "joint", "joint_orth"}))
def test_the_type_of_steering_counts_only_where_there_are_several(method):
    for preset in PRESETS:
        assert settings(preset, method, steering_type="vector") == settings(preset, method)


def test_loreft_has_a_rate_for_each_site():
    found = {site: settings("default", "loreft", site=site).values for site in presets.SITES["loreft"]}
    rates = {site: values["learning_rate"] for site, values in found.items()}
    assert rates == {"post_block": 5e-4, "post_mlp": 2e-3}
    assert settings("default", "loreft", site="post_block") == settings("default", "loreft")
    assert settings("paper", "loreft", site="post_block") == settings("paper", "loreft")


@pytest.mark.parametrize(("method", "steering_type"), [("lofit", "low_rank"), ("sublayer", "vector")])
def test_no_rank_is_set_where_there_is_none(method, steering_type):
    assert "steering_r" not in settings("paper", method, "alpaca", steering_type).values
    assert settings("paper", "loreft", "alpaca").values["steering_r"] == 16
