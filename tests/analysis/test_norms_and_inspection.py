"""Norms, spectra and problems of adapters are read from their folders alone."""

import numpy as np
import pytest
import torch
from analysis_cases import adapted_model, double_model, with_adapter
from peft import IA3Config, LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tuner_cases import ROWS

from trl_steer import OrthogonalityConstraint
from trl_steer.analysis import adapter_norms, effective_rank, inspect_adapter, read_updates
from trl_steer.tuners.steering import SteeringLayer

WEIGHTS = "adapter_model.safetensors"
BLOCK_1 = "base_model.model.model.layers.1.post_block_steering.steering_adapter."


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def matrix_of(leaf):
    """The matrix of an adapter's update, from what it does to the unit vectors."""
    width = 32  # of the residual stream, and of all heads together
    zero, unit = torch.zeros(1, width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    with torch.no_grad():
        offset = leaf(zero)
        return (leaf(unit) - unit - offset).T.numpy(), offset[0].numpy()


@pytest.mark.parametrize("row", [row for row in ROWS if "silu" not in row])
def test_norms_are_those_of_what_the_adapter_adds(row, tmp_path):
    model = adapted_model(row, "gemma3", scaling=0.7)
    found = [row for row in adapter_norms(saved(model, tmp_path)) if row["is_steering"]]
    layers = [module for module in model.modules() if isinstance(module, SteeringLayer)]
    assert [row["block"] for row in found] == [0, 1, 2]
    for row, layer in zip(found, layers, strict=True):
        (leaf,) = layer.adapters.values()
        matrix, offset = matrix_of(leaf)
        spectrum = np.linalg.svd(matrix, compute_uv=False)
        expected = spectrum if spectrum[0] > 1e-12 else np.array([np.linalg.norm(offset)])
        assert row["norm"] == pytest.approx(expected[0], abs=1e-8)
        assert row["frobenius"] == pytest.approx(np.linalg.norm(expected), abs=1e-8)
        assert row["offset"] == pytest.approx(np.linalg.norm(offset), abs=1e-8)
        for name, norm in row["tensors"].items():
            tensor = getattr(leaf, name).detach().numpy()
            assert norm == pytest.approx(np.linalg.norm(tensor, 2), abs=1e-8)


@pytest.mark.parametrize("rslora", [False, True])
def test_norms_of_lora_are_those_of_its_delta_weights(rslora, tmp_path):
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 7},
        init_lora_weights=False,
    )
    model = with_adapter(double_model(), config)
    found = {(row["block"], row["module"]): row["norm"] for row in adapter_norms(saved(model, tmp_path))}
    assert len(found) == 6
    for block, layer in enumerate(model.get_base_model().model.layers):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            delta = layer.get_submodule(name).get_delta_weight("default").detach().numpy()
            assert found[block, name] == pytest.approx(np.linalg.norm(delta, 2), abs=1e-8)


@pytest.mark.parametrize("row", ROWS)
def test_every_adapter_is_inspected(row, tmp_path):
    model = adapted_model(row)
    found = inspect_adapter(saved(model, tmp_path), base_parameters=10_000)
    assert found["type"] == ROWS[row].config().peft_type.value
    tensors = load_file(tmp_path / WEIGHTS)
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["share"] == found["parameters"] / 10_000
    assert found["dtypes"] == ["float64"]
    assert found["problems"] == []
    assert bool(found["overlap"]) == ROWS[row].has_lora


def test_spectrum_and_effective_rank_are_those_of_the_update(tmp_path):
    found = inspect_adapter(saved(adapted_model("low_rank"), tmp_path))
    assert found["rank"] == 3
    tensors = {key.removeprefix(BLOCK_1): tensor.numpy() for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    spectrum = np.linalg.svd(tensors["up"] @ tensors["down"], compute_uv=False)[:3]
    np.testing.assert_allclose(found["updates"][1]["spectrum"], spectrum, atol=1e-8)
    p = spectrum / spectrum.sum()
    assert found["updates"][1]["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-8)
    assert effective_rank(torch.ones(4)) == pytest.approx(4)
    assert effective_rank(torch.zeros(4)) is None


def test_overlap_of_a_joint_adapter_is_that_of_the_constraint(tmp_path):
    model = adapted_model("joint-low_rank")
    before = inspect_adapter(saved(model, tmp_path / "naive"))["overlap"]["mlp.down_proj"]
    block = model.get_base_model().model.layers
    direct = 0.0
    for each in block:
        (leaf,) = each.post_block_steering.adapters.values()
        Q = np.linalg.svd(each.mlp.down_proj.lora_B["default"].weight.detach().numpy(), full_matrices=False)[0]
        up = leaf.up.detach().numpy()
        direct = max(direct, np.abs(Q.T @ up).max() / np.linalg.norm(up))
    assert before == pytest.approx(direct, abs=1e-8)
    OrthogonalityConstraint(model, "default").project()
    assert inspect_adapter(saved(model, tmp_path / "orthogonal"))["overlap"]["mlp.down_proj"] < 1e-12


def test_first_and_last_tokens_with_weights_of_their_own_are_two_updates(tmp_path):
    model = adapted_model("loreft", positions="f2+l2", share_weights=False)
    found = read_updates(saved(model, tmp_path))
    assert [update.module for update in found[:2]] == ["post_block (first)", "post_block (last)"]
    leaf = model.get_base_model().model.layers[0].loreft.adapters["default"]
    for part, update in enumerate(found[:2]):
        matrix = (leaf.rotation[part].T @ (leaf.weight[part] - leaf.rotation[part])).detach().numpy()
        expected = np.linalg.svd(matrix, compute_uv=False)[:3]
        np.testing.assert_allclose(update.spectrum.numpy(), expected, atol=1e-8)


def test_problems_are_named(tmp_path):
    model = adapted_model("low_rank")
    folder = saved(model, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    names = {index: [key for key in tensors if f".{index}." in key] for index in range(3)}
    tensors[next(key for key in names[0] if key.endswith("up"))].zero_()
    tensors[next(key for key in names[1] if key.endswith("up"))][0, 0] = torch.nan
    del tensors[next(key for key in names[2] if key.endswith("up"))]
    save_file(tensors, folder / WEIGHTS)
    zero, infinite, missing = inspect_adapter(folder)["problems"]
    assert zero == "Block 0, post_block: the update is zero, as before training."
    assert infinite == "Block 1, post_block: values of up are not finite."
    assert missing.startswith("Block 2, post_block: ")
    assert "up" in missing


def test_other_adapters_and_folders_are_errors(tmp_path):
    other = with_adapter(double_model(), IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="expected one of ours or LoRA"):
        inspect_adapter(saved(other, tmp_path / "ia3"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Can't find weights"):
        inspect_adapter(tmp_path / "empty")


def test_lora_layers_are_found(tmp_path):
    model = adapted_model("joint-low_rank")
    lora = [update for update in read_updates(saved(model, tmp_path)) if not update.is_steering]
    assert len(lora) == sum(isinstance(module, LoraLayer) for module in model.modules())
