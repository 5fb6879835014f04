"""Adapters on experts that transformers 5 has fused, from before it did."""

import torch
from model_zoo import tiny_inputs, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from trl_steer import PostBlockSteeringConfig
from trl_steer.tuners.joint_steering import join_adapters

BLOCKS, EXPERTS, WIDTH, INNER, RANK = 3, 3, 32, 48, 2


def old_lora(folder):
    """A LoRA adapter on the experts of a Mixtral, each with linear layers of its own."""
    tensors = {}
    for block in range(BLOCKS):
        for expert in range(EXPERTS):
            for name, (outputs, inputs) in {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}.items():
                module = f"base_model.model.model.layers.{block}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(RANK, inputs)
                tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(outputs, RANK)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["w1", "w2", "w3"]).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs()).logits


def test_an_old_lora_adapter_joined_with_steering_loads_as_it_does_alone(tmp_path):
    (tmp_path / "lora").mkdir()
    old_lora(tmp_path / "lora")
    get_peft_model(tiny_model("mixtral"), PostBlockSteeringConfig()).save_pretrained(tmp_path / "steering")
    join_adapters(tmp_path / "lora", tmp_path / "steering", tmp_path / "joint")
    alone, joint = (
        logits(PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / name)) for name in ("lora", "joint")
    )
    assert not torch.allclose(alone, logits(tiny_model("mixtral")), atol=1e-3)
    assert torch.equal(joint, alone)
