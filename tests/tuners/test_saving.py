"""An adapter is saved whole or not at all. Saving from FSDP2 is tested with the training there."""

import pytest
import torch
from peft import get_peft_model
from tiny_chat import tiny_model
from tuner_cases import ROWS, over_rows

from trl_steer import JointSteeringConfig, JolaConfig, LofitConfig, PostBlockSteeringConfig, SublayerSteeringConfig

CASES = {
    "steering": (PostBlockSteeringConfig(r=2), "steering_adapter.default.up"),
    "vector": (PostBlockSteeringConfig(steering_type="vector"), "steering_adapter.default.vector"),
    "sublayer": (SublayerSteeringConfig(r=2), "sublayer_steering.steering_adapter.default.up"),
    "lofit": (LofitConfig(), "lofit.steering_adapter.default.offset"),
    "jola": (JolaConfig(), "jola.steering_adapter.default.scale"),
    "joint, steering half": (JointSteeringConfig(r=2), "lora_steering_adapter.default.down"),
    "joint, LoRA half": (JointSteeringConfig(r=2), "down_proj.lora_B.default.weight"),
    "saved module": (PostBlockSteeringConfig(modules_to_save=["lm_head"]), "modules_to_save.default.weight"),
    "saved module of joint": (JointSteeringConfig(modules_to_save=["lm_head"]), "modules_to_save.default.weight"),
}
over_cases = pytest.mark.parametrize(("config", "tensor_name"), CASES.values(), ids=list(CASES))


def assert_refused(model, folder, message: str, **arguments):
    with pytest.raises(ValueError, match=message) as caught:
        model.save_pretrained(folder, **arguments)
    assert "accelerator.get_state_dict" in str(caught.value)  # what to do
    assert not list(folder.glob("adapter_*"))
    return str(caught.value)


@over_cases
def test_parameter_emptied_by_zero3_is_refused_by_name(config, tensor_name, tmp_path):
    model = get_peft_model(tiny_model(), config)
    name, parameter = next((name, p) for name, p in model.named_parameters() if name.endswith(tensor_name))
    parameter.data = torch.empty(0)  # as DeepSpeed does
    assert name in assert_refused(model, tmp_path, "without elements")


@pytest.mark.parametrize("case", ["steering", "sublayer", "lofit", "jola", "joint, steering half", "joint, LoRA half"])
def test_a_flat_piece_of_a_matrix_is_refused_by_name(case, tmp_path):
    config, tensor_name = CASES[case]
    model = get_peft_model(tiny_model(), config)
    state = {name: t.flatten()[:7] if name.endswith(tensor_name) else t for name, t in model.state_dict().items()}
    named = next(name for name in state if name.endswith(tensor_name))
    assert named in assert_refused(model, tmp_path, "expected a matrix", state_dict=state)


@over_rows
def test_a_state_dict_without_the_adapter_is_refused(row, tmp_path):
    model = get_peft_model(tiny_model(), ROWS[row].config(layers_to_transform=[0, 1]))
    assert_refused(model, tmp_path, "no tensors of adapter 'default'", state_dict={})


def test_magnitudes_and_biases_of_lora_are_no_flat_pieces(tmp_path):
    config = JointSteeringConfig(r=2, use_dora=True, target_modules=["up_proj", "down_proj"])
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "dora")
    config = JointSteeringConfig(r=2, lora_bias=True, target_modules=["q_proj"])
    get_peft_model(tiny_model("qwen2"), config).save_pretrained(tmp_path / "bias")
    assert all((tmp_path / name / "adapter_model.safetensors").exists() for name in ("dora", "bias"))
