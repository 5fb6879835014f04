"""`init_from`: a new adapter starts from the weights of another one."""

import json

import pytest
import torch
from model_zoo import tiny_model
from peft import PeftConfig, PeftModel, get_peft_model
from steering_cases import assert_same_weights, logits, parameters_of, steer, steering_config, weights_of
from tuner_cases import ROWS

from trl_steer import JointSteeringConfig, PostBlockSteeringConfig

STEERING = [name for name, row in ROWS.items() if not row.has_lora]


def saved(folder, row="low_rank", **fields):
    model = steer(tiny_model(), row, **fields)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("row", STEERING)
def test_a_new_adapter_starts_from_the_folder(row, tmp_path):
    first = saved(tmp_path, row)
    model = steer(tiny_model(), row, seed=1, init_from=tmp_path)
    for name, parameter in parameters_of(model).items():
        torch.testing.assert_close(parameter, first.get_parameter(name), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in parameters_of(model).values())
    torch.testing.assert_close(logits(model), logits(first), rtol=0, atol=0)


def test_the_folder_is_not_saved_and_not_read_again(tmp_path):
    saved(tmp_path / "first")
    model = steer(tiny_model(), init_from=str(tmp_path / "first"))
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter.mul_(2)
    model.save_pretrained(tmp_path / "second")
    assert "init_from" not in json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert str(tmp_path) not in (tmp_path / "second" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "second")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_a_configuration_can_be_used_again(tmp_path):
    first, config = saved(tmp_path), steering_config(init_from=str(tmp_path))
    for _ in range(2):
        model = get_peft_model(tiny_model(), config).eval()
        torch.testing.assert_close(logits(model), logits(first), rtol=0, atol=0)


def test_sums_of_such_adapters_are_sums(tmp_path):
    saved(tmp_path)
    model = steer(tiny_model(), init_from=str(tmp_path))
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum")
    before = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), before)


def test_the_steering_half_of_a_joint_adapter_starts_from_a_steering_folder(tmp_path):
    first = saved(tmp_path / "steering")
    steering = {"r": 3, "init_from": str(tmp_path / "steering")}
    model = get_peft_model(tiny_model(), JointSteeringConfig(task_type="CAUSAL_LM", r=4, steering=steering)).eval()
    torch.testing.assert_close(logits(model), logits(first))  # LoRA is zero
    model.save_pretrained(tmp_path / "joint")
    assert "init_from" not in (tmp_path / "joint" / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "joint")
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"row": "vector"}, {}, "its steering_type is 'vector', but the new adapter has 'low_rank'"),
        ({"r": 2}, {}, "its r is 2, but the new adapter has 3. Set r=2"),
        ({"scaling": 0.5}, {}, "its scaling is 0.5"),
        ({"activation": "silu"}, {}, "its activation is 'silu'"),
        ({"rank_pattern": {"layers.1": 1}}, {}, "its rank_pattern is"),
        ({"row": "post_mlp-low_rank"}, {}, "it has a SublayerSteeringConfig, expected a PostBlockSteeringConfig"),
        ({"layers_to_transform": [0, 1]}, {}, r"layers\.2.* is missing"),
        ({}, {"layers_to_transform": [0, 1]}, r"layers\.2.* is unexpected"),
    ],
)
def test_another_structure_is_an_error_that_names_it(made, asked, message, tmp_path):
    saved(tmp_path, **made)
    base = tiny_model()
    before = weights_of(base)
    with pytest.raises(ValueError, match=rf"(?s)cannot start from init_from=.*{message}"):
        steer(base, **asked, init_from=str(tmp_path))
    assert_same_weights(base, before)
    assert not any("steering" in name for name, _ in base.named_modules())


def test_another_base_is_an_error(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="trained on a model of type 'llama', but the base model is of type 'qwen2'"):
        steer(tiny_model("qwen2"), init_from=str(tmp_path))
    with pytest.raises(ValueError, match=r"has shape \(3, 32\), expected \(3, 16\)"):
        steer(tiny_model("llama", hidden_size=16), init_from=str(tmp_path))


@pytest.mark.parametrize("are_folders", [True, False])
def test_the_names_of_two_bases_are_compared(are_folders, tmp_path):
    for name in ("one/base", "another/base"):
        (tmp_path / name).mkdir(parents=True)
    names = [str(tmp_path / name) if are_folders else name for name in ("one/base", "another/base")]
    saved(tmp_path / "adapter", base_model_name_or_path=names[0])
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    config.base_model_name_or_path = names[0]
    config.save_pretrained(str(tmp_path / "adapter"))
    base = tiny_model()
    base.name_or_path = names[1]
    with pytest.raises(ValueError, match=r"its base model is .*one/base"):
        steer(base, init_from=str(tmp_path / "adapter"))
    base.name_or_path = names[0]
    steer(base, init_from=str(tmp_path / "adapter"))


def test_empty_weights_are_an_error(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="low_cpu_mem_usage=True creates empty weights"):
        get_peft_model(tiny_model(), steering_config(init_from=str(tmp_path)), low_cpu_mem_usage=True)


def test_a_folder_without_weights_is_an_error(tmp_path):
    PostBlockSteeringConfig(r=3).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Can't find weights"):
        steer(tiny_model(), init_from=str(tmp_path))
    with pytest.raises(TypeError, match="init_from must be a string or None"):
        PostBlockSteeringConfig(init_from=3)
