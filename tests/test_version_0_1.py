"""Adapter folders that version 0.1 wrote load and mean what they meant."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from version_0_1 import FOLDERS, INPUT_IDS, base_model

over_folders = pytest.mark.parametrize("folder", sorted(FOLDERS.iterdir()), ids=lambda folder: folder.name)


def load_with_peft(folder):
    return PeftModel.from_pretrained(base_model(), folder).eval()


def load_with_transformers(folder):
    model = base_model()
    model.load_adapter(str(folder))
    return model.eval()


over_loaders = pytest.mark.parametrize("load", [load_with_peft, load_with_transformers])


@torch.no_grad()
def logits(model):
    return model(input_ids=INPUT_IDS).logits


def steered_by_hand(folder):
    """The base model with the formulas of section 3 of the paper in forward hooks."""
    config = PeftConfig.from_pretrained(folder)
    steering = getattr(config, "steering", None) or config.to_dict()
    model = base_model()
    tensors = load_file(folder / "adapter_model.safetensors")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, tensor_name = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        modules.setdefault(path, {})[tensor_name] = tensor

    def lora(A, B):
        scaling = config.lora_alpha / config.r
        return lambda module, args, output: output + F.linear(F.linear(args[0], A), B) * scaling

    def low_rank(down, up):
        def hook(block, args, h):
            z = F.linear(h, down)
            a = z if steering["activation"] is None else F.silu(z)
            return F.linear(steering["scaling"] * a, up) + h

        return hook

    def vector(v):
        return lambda block, args, h: h + steering["scaling"] * v

    for path, tensors in modules.items():
        block, marker, _ = path.partition(".post_block_steering.")
        if not marker:
            hook = lora(tensors["lora_A"], tensors["lora_B"])
        elif "vector" in tensors:
            hook = vector(tensors["vector"])
        else:
            hook = low_rank(tensors["down"], tensors["up"])
        model.get_submodule(block).register_forward_hook(hook)
    return model


@over_folders
@over_loaders
def test_logits_of_version_0_1_folders_are_the_recorded_ones(folder, load):
    recorded = load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits(load(folder)), recorded, atol=1e-6, rtol=0)
    assert not torch.allclose(logits(base_model()), recorded, atol=1e-3)


@over_folders
@over_loaders
def test_logits_are_those_of_the_formula_bit_for_bit(folder, load):
    assert torch.equal(logits(load(folder)), logits(steered_by_hand(folder)))
