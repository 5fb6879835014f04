"""Which LoRA matrices the constraint is about."""

import pytest
import torch
from model_zoo import COMMON, tiny_model
from peft import BdLoraConfig, get_peft_model
from transformers import Gemma3nForCausalLM, Glm4ForCausalLM

from trl_steer import JointSteeringConfig
from trl_steer.tuners.joint_steering import find_pairs

LAST_LINEAR = {
    "llama": "mlp.down_proj",
    "gemma3": "mlp.down_proj",
    "olmo2": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "falcon": "mlp.dense_4h_to_h",
    "phi3": "mlp.down_proj",
    "starcoder2": "mlp.c_proj",
}


def joint_model(family="llama", **kwargs):
    return get_peft_model(tiny_model(family), JointSteeringConfig(**{"init_lora_weights": False, "r": 4, **kwargs}))


def writers_of(model, **kwargs):
    names = {module: name for name, module in model.named_modules()}
    return [[names[lora] for lora, _ in pair.lora_layers] for pair in find_pairs(model, "default", **kwargs)]


@pytest.mark.parametrize("family", LAST_LINEAR)
def test_default_pair_is_the_last_linear_layer_of_the_mlp(family):
    for writers in writers_of(joint_model(family)):
        assert len(writers) == 1
        assert writers[0].endswith(LAST_LINEAR[family])


def test_orthogonal_modules_can_be_named():
    for writers in writers_of(joint_model(), modules=["down_proj", "o_proj"]):
        assert {name.rpartition(".")[2] for name in writers} == {"down_proj", "o_proj"}


def test_a_block_diagonal_matrix_counts_in_full():
    config = BdLoraConfig(target_modules_bd_b=["down_proj"], nblocks=2, match_strict=False)
    for pair in find_pairs(joint_model(use_bdlora=config), "default"):
        lora_B = pair.lora_layers[0][0].lora_B["default"]
        torch.nn.init.normal_(lora_B.weight)
        (B,) = pair.output_matrices("default")
        torch.testing.assert_close(B, lora_B(torch.eye(4)).T.detach())


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize("module", ["down_proj", "o_proj"])
def test_a_norm_before_the_residual_addition_scales_what_reaches_it(family, module):
    model = joint_model(family)
    block = model.base_model.model.get_submodule("model.layers.1")
    norm = block.post_feedforward_layernorm if module == "down_proj" else block.post_attention_layernorm
    torch.nn.init.normal_(norm.weight)
    pair = find_pairs(model, "default", [module])[1]
    B = pair.lora_layers[0][0].lora_B["default"].weight
    (matrix,) = pair.output_matrices("default")
    # The norm divides by the size of its input, so it is asked for the direction of each of B's columns alone.
    expected = torch.nn.functional.normalize(norm(B.T), dim=1)
    torch.testing.assert_close(torch.nn.functional.normalize(matrix.T, dim=1).float(), expected)
    # Rounded products would turn small singular directions.
    weight = norm.weight.detach().double() + (0 if family == "olmo2" else 1)
    assert torch.equal(matrix, B.detach().double() * weight[:, None])


def tiny(model_cls, **fields):
    return model_cls(model_cls.config_class(**{**COMMON, "head_dim": 8, **fields}))


def test_glm4s_norms_before_the_residual_addition_have_other_names():
    model = get_peft_model(tiny(Glm4ForCausalLM), JointSteeringConfig(r=4, init_lora_weights=False))
    block = model.base_model.model.model.layers[0]
    torch.nn.init.normal_(block.post_mlp_layernorm.weight)
    torch.nn.init.normal_(block.post_self_attn_layernorm.weight)
    pair = find_pairs(model, "default", ["down_proj", "o_proj"])[0]
    gains = [block.post_self_attn_layernorm.weight, block.post_mlp_layernorm.weight]
    for (lora, _), gain, matrix in zip(pair.lora_layers, gains, pair.output_matrices("default"), strict=True):
        assert torch.equal(matrix, gain[:, None].double() * lora.lora_B["default"].weight.double())


def test_a_projection_behind_the_mlp_is_not_taken_for_its_last_layer():
    fields = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
    sizes = {"num_hidden_layers": 2, "intermediate_size": [48] * 2, "activation_sparsity_pattern": [0.0] * 2}
    model = get_peft_model(tiny(Gemma3nForCausalLM, **fields, **sizes), JointSteeringConfig(r=4))
    for (writer,) in writers_of(model):
        assert writer.endswith("mlp.down_proj")


def test_llamas_norm_after_the_attention_does_not_scale_lora():
    assert all(
        norm is None for pair in find_pairs(joint_model(), "default", ["o_proj"]) for _, norm in pair.lora_layers
    )


def test_blocks_that_are_not_steered_are_not_paired():
    model = joint_model(steering={"layers_to_transform": [1]})
    assert [pair.name.rpartition(".")[2] for pair in find_pairs(model, "default")] == ["1"]


def test_blocks_that_lora_leaves_alone_are_left_out():
    model = joint_model(target_modules=["down_proj"], layers_to_transform=[0])
    assert [pair.name.rpartition(".")[2] for pair in find_pairs(model, "default")] == ["0"]


@pytest.mark.parametrize(
    ("config", "modules", "message"),
    [
        ({"target_modules": ["q_proj"]}, None, "There is nothing to be orthogonal to"),
        ({}, ["nonsense"], r"is one of \['nonsense'\]"),
        ({}, ["down_proj", "o_prj"], r"contains \['o_prj'\]"),
        ({"r": 28, "steering": {"r": 8}}, None, "exceeds the hidden size 32"),
        ({"r": 32, "steering": {"steering_type": "vector"}}, None, "exceeds the hidden size"),
    ],
)
def test_constraints_that_cannot_hold_are_refused(config, modules, message):
    with pytest.raises(ValueError, match=message):
        find_pairs(joint_model(**config), "default", modules)


def test_a_model_without_an_mlp_of_linear_layers_is_refused():
    with pytest.raises(ValueError, match="orthogonal_modules"):
        find_pairs(joint_model("mixtral"), "default")


def test_missing_adapter_is_refused():
    with pytest.raises(ValueError, match="'other' steers no block"):
        find_pairs(joint_model(), "other")
