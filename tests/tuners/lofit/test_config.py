"""`LofitConfig`: what it accepts, what it says otherwise, and that it survives a file."""

from __future__ import annotations

import json
import math

import pytest
from model_zoo import tiny_model
from peft import PeftConfig, PeftType, get_peft_model

from trl_steer import LofitConfig


def test_defaults_are_the_documented_ones():
    config = LofitConfig()
    assert config.peft_type == PeftType.LOFIT
    assert config.site == "heads"
    fields = ("phase", "heads", "penalty_weight", "scaling", "init_weights", "layers_to_transform")
    assert [getattr(config, field) for field in fields] == ["offset", None, 5e-4, 1.0, True, None]


@pytest.mark.parametrize(
    "heads", [{0: [3, 1], 2: [0]}, {"2": [0], "0": [1, 3]}, [(0, 3), (2, 0), (0, 1)], [[2, 0], [0, 1], [0, 3]]]
)
def test_heads_are_written_in_several_ways_and_survive_a_file(heads, tmp_path):
    config = LofitConfig(heads=heads)
    assert config.heads == {0: [1, 3], 2: [0]}
    assert config.layers_to_transform == [0, 2]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["heads"] == {"0": [1, 3], "2": [0]}
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert "| heads | 3 |" in (tmp_path / "README.md").read_text()


def test_layers_to_transform_selects_among_the_blocks_of_heads():
    config = LofitConfig(heads={0: [1], 1: [2], 2: [3]}, layers_to_transform=[2, 0])
    assert config.heads == {0: [1], 2: [3]}
    assert config.layers_to_transform == [0, 2]


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"phase": "both"}, ValueError, ["Expected phase to be one of 'offset', 'scale', got 'both'."]),
        ({"penalty_weight": 0.1}, ValueError, ["penalty_weight=0.1", "'offset'", "'scale'"]),
        ({"penalty_weight": -1.0, "phase": "scale"}, ValueError, ["at least 0", "-1.0"]),
        ({"penalty_weight": math.nan, "phase": "scale"}, ValueError, ["finite", "nan"]),
        ({"penalty_weight": None, "phase": "scale"}, TypeError, ["penalty_weight", "None"]),
        ({"heads": 3}, TypeError, ["dictionary", "pairs", "3"]),
        ({"heads": {0: 3}}, TypeError, ["dictionary", "{0: 3}"]),
        ({"heads": {0: []}}, TypeError, ["dictionary", "{0: []}"]),
        ({"heads": [3]}, TypeError, ["pairs", "[3]"]),
        ({"heads": {"x": [3]}}, TypeError, ["indices", "'x'"]),
        ({"heads": {0: ["3"]}}, TypeError, ["indices", "'3'"]),
        ({"heads": {0: [True]}}, TypeError, ["indices", "True"]),
        ({"heads": {0: [-1]}}, ValueError, ["from 0", "-1"]),
        ({"heads": {0: [1, 1]}}, ValueError, ["head 1 of block 0 twice"]),
        ({"heads": {}}, ValueError, ["empty", "None"]),
        ({"heads": {0: [1]}, "layers_to_transform": [0, 2]}, ValueError, ["blocks [2]", "{0: [1]}"]),
        ({"heads": {0: [1]}, "target_modules": r".*\.0"}, ValueError, ["regular expression", "{0: [1]}"]),
    ],
)
def test_impossible_values_are_refused_with_what_was_given_and_what_is_allowed(fields, error, said):
    with pytest.raises(error) as info:
        LofitConfig(**fields)
    for text in said:
        assert text in str(info.value)


def test_heads_that_the_model_does_not_have_are_named():
    with pytest.raises(ValueError, match=r"names \[4\] in model.layers.1, which has heads 0 to 3"):
        get_peft_model(tiny_model(), LofitConfig(heads={1: [4]}))
    with pytest.raises(ValueError, match=r"\[7\], but the blocks are"):
        get_peft_model(tiny_model(), LofitConfig(heads={7: [0]}))
