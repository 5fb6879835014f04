"""`PostBlockSteeringConfig`: what it accepts, what it says otherwise, and that it survives a file."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftType
from transformers.activations import ACT2FN

from trl_steer import PostBlockSteeringConfig


def test_defaults_are_the_documented_ones():
    config = PostBlockSteeringConfig()
    assert config.peft_type == PeftType.POST_BLOCK_STEERING
    fields = ("r", "steering_type", "activation", "scaling", "dropout", "init_weights", "init_scale")
    assert [getattr(config, field) for field in fields] == [8, "low_rank", None, 1.0, 0.0, True, 1.0]
    optional = (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "modules_to_save",
        "trainable_token_indices",
    )
    assert [getattr(config, field) for field in optional] == [None] * 5


@pytest.mark.parametrize(
    ("fields", "error", "given_and_allowed"),
    [
        ({"r": 0}, ValueError, ["r must be at least 1", "0"]),
        ({"r": -4}, ValueError, ["r must be at least 1", "-4"]),
        ({"r": 2.0}, TypeError, ["r must be an integer", "2.0"]),
        ({"r": "8"}, TypeError, ["r must be an integer", "'8'"]),
        ({"r": True}, TypeError, ["r must be an integer", "True"]),
        ({"steering_type": "matrix"}, ValueError, ["'matrix'", "'low_rank'", "'vector'"]),
        ({"activation": "swish2"}, ValueError, ["'swish2'", "None", "'silu'"]),
        ({"activation": "prelu"}, ValueError, ["'prelu'"]),
        ({"activation": "silu", "steering_type": "vector"}, ValueError, ["'silu'", "'vector'", "None"]),
        ({"dropout": 0.1, "steering_type": "vector"}, ValueError, ["0.1", "'vector'", "0.0"]),
        ({"dropout": -0.1}, ValueError, ["dropout", "-0.1"]),
        ({"dropout": 1.0}, ValueError, ["dropout", "1.0", "less than 1"]),
        ({"dropout": "a bit"}, TypeError, ["dropout", "'a bit'"]),
        ({"scaling": math.nan}, ValueError, ["scaling", "finite", "nan"]),
        ({"scaling": math.inf}, ValueError, ["scaling", "finite", "inf"]),
        ({"scaling": None}, TypeError, ["scaling", "None"]),
        ({"scaling": 10**400}, ValueError, ["scaling", "finite"]),
        ({"init_weights": "yes"}, TypeError, ["init_weights", "'yes'"]),
        ({"activation": ["silu"]}, ValueError, ["['silu']", "'silu'"]),
        ({"target_modules": 3}, TypeError, ["target_modules", "list of names", "3"]),
        ({"target_modules": [1]}, TypeError, ["target_modules", "list of names", "[1]"]),
        ({"exclude_modules": 5}, TypeError, ["exclude_modules", "list of names", "5"]),
        ({"modules_to_save": "lm_head"}, TypeError, ["modules_to_save", "list of names", "'lm_head'"]),
        ({"trainable_token_indices": "x"}, TypeError, ["trainable_token_indices", "list", "'x'"]),
        ({"init_scale": 0.0}, ValueError, ["init_scale", "greater than 0", "0.0"]),
        ({"init_scale": -1.0}, ValueError, ["init_scale", "greater than 0", "-1.0"]),
        ({"layers_to_transform": -1}, ValueError, ["layers_to_transform", "from 0", "-1"]),
        ({"layers_to_transform": [0, -1]}, ValueError, ["layers_to_transform", "from 0", "-1"]),
        ({"layers_to_transform": [1, 2, 1]}, ValueError, ["twice", "[1, 2, 1]"]),
        ({"layers_to_transform": []}, ValueError, ["empty", "None"]),
        ({"layers_to_transform": ["1"]}, TypeError, ["layers_to_transform", "integers", "'1'"]),
        ({"layers_to_transform": [True]}, TypeError, ["layers_to_transform", "integers", "True"]),
        (
            {"layers_to_transform": [1], "target_modules": r"model\.layers\.\d"},
            ValueError,
            ["layers_to_transform=[1]", "target_modules", "expression"],
        ),
    ],
)
def test_impossible_values_are_refused_with_what_was_given_and_what_is_allowed(fields, error, given_and_allowed):
    with pytest.raises(error) as info:
        PostBlockSteeringConfig(**fields)
    for text in given_and_allowed:
        assert text in str(info.value)


@pytest.mark.parametrize("activation", sorted(set(ACT2FN) - {"prelu", "xielu"}))
def test_every_activation_without_parameters_is_accepted(activation):
    assert PostBlockSteeringConfig(activation=activation).activation == activation


@settings(max_examples=50, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "r": st.integers(1, 4096),
            "activation": st.sampled_from([None, "silu", "gelu", "relu"]),
            "scaling": st.floats(-1e6, 1e6),
            "dropout": st.floats(0, 0.99),
            "init_weights": st.booleans(),
            "init_scale": st.floats(1e-6, 10),
            "target_modules": st.none()
            | st.lists(st.sampled_from(["layers.0", "layers.1", "h"]), min_size=1, unique=True),
            "exclude_modules": st.none() | st.just(r".*\.3") | st.just(["layers.7"]),
            "layers_to_transform": st.none()
            | st.integers(0, 99)
            | st.lists(st.integers(0, 99), min_size=1, unique=True),
            "modules_to_save": st.none() | st.just(["lm_head"]),
            "trainable_token_indices": st.none() | st.lists(st.integers(0, 9), min_size=1),
        },
    )
)
def test_configs_survive_a_file(fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    config = PostBlockSteeringConfig(**fields, task_type="CAUSAL_LM", base_model_name_or_path="some/model")
    config.save_pretrained(folder)
    for loaded in (PostBlockSteeringConfig.from_pretrained(folder), PeftConfig.from_pretrained(folder)):
        assert type(loaded) is PostBlockSteeringConfig
        # PEFT saves what an adapter for inference is
        assert {**loaded.to_dict(), "inference_mode": False} == {**config.to_dict(), "inference_mode": False}


def test_file_holds_all_that_the_forward_needs(tmp_path):
    PostBlockSteeringConfig(r=3, activation="silu", scaling=0.25, dropout=0.125).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "POST_BLOCK_STEERING", "steering_type": "low_rank", "r": 3, "activation": "silu"}
    assert {**expected, "scaling": 0.25, "dropout": 0.125}.items() <= saved.items()


def test_target_lists_and_sets_mean_the_same():
    as_list, as_set = (PostBlockSteeringConfig(target_modules=kind(["a", "b"])) for kind in (list, set))
    assert as_list.target_modules == as_set.target_modules == {"a", "b"}
    assert PostBlockSteeringConfig(layers_to_transform=range(3)).layers_to_transform == [0, 1, 2]
