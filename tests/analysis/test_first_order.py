"""The first-order prediction is the paper's formula, and what remains is of second order."""

import numpy as np
import pytest
import torch
from analysis_cases import EVERY_FAMILY, adapted_model, batches, double_model, with_adapter
from peft import LoraConfig
from torch.nn import functional as F

from trl_steer.analysis import first_order, record

# Plain MLPs have biases here.
PLAIN = {"gpt2": "activation_function", "starcoder2": "hidden_act"}
GATED = {"llama": "hidden_act", "gemma3": "hidden_activation"}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


def states_at_mlp(model, block):
    return torch.cat([record(model, batch, ["pre_mlp"], [block])[block, "pre_mlp"] for batch in batches("alone")])


def rms(rows):
    return rows.square().sum(1).mean().sqrt().item()


def derivative_of(phi, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(phi(z).sum(), z)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", [*PLAIN, *GATED])
def test_remainder_is_of_second_order(family, activation):
    model = double_model(family, **{{**PLAIN, **GATED}[family]: activation})
    rows = first_order(model, batches())
    assert len(rows) == 6
    for row in rows:
        assert row["source"] == "random"
        assert row["slope"] == pytest.approx(2, abs=0.1)
        assert row["change"][0] == pytest.approx(row["predicted"][0], rel=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prediction_for_a_gated_mlp_is_the_formula_of_the_paper(activation):
    phi = ACTIVATIONS[activation]
    config = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    model = with_adapter(double_model(hidden_act=activation), config)
    mlp = model.get_base_model().model.layers[1].mlp
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    (Wg, Wu, Wd), (dg, du, dd) = (
        [layer.get_base_layer().weight.detach() for layer in linears],
        [layer.get_delta_weight("default").detach() for layer in linears],
    )
    h = states_at_mlp(double_model(hidden_act=activation), 1)
    g, u = h @ Wg.T, h @ Wu.T
    last = (phi(g) * u) @ dd.T
    others = (derivative_of(phi, g) * u * (h @ dg.T) + phi(g) * (h @ du.T)) @ Wd.T
    steering, weights = first_order(model, batches(), scales=(1e-3, 1e-2), blocks=[1])
    assert (weights["source"], steering["source"]) == ("adapter", "random")
    assert weights["predicted"][0] == pytest.approx(1e-3 * rms(last + others), rel=1e-8)
    assert weights["last_layer"] == pytest.approx(rms(last), rel=1e-8)
    assert weights["other_layers"] == pytest.approx(rms(others), rel=1e-8)
    change = (phi(h @ (Wg + 0.01 * dg).T) * (h @ (Wu + 0.01 * du).T)) @ (Wd + 0.01 * dd).T - (phi(g) * u) @ Wd.T
    assert weights["change"][1] == pytest.approx(rms(change), rel=1e-8)
    assert weights["remainder"][1] == pytest.approx(rms(change - 0.01 * (last + others)), rel=1e-8)


def test_prediction_for_steering_is_the_jacobian_of_the_paper():
    model = adapted_model("pre_mlp-low_rank")
    block = model.get_base_model().model.layers[2]
    (leaf,) = block.sublayer_steering.adapters.values()
    Wg, Wu, Wd = (layer.weight.detach() for layer in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj))
    h = states_at_mlp(double_model(), 2)
    dh = h @ leaf.down.detach().T @ leaf.up.detach().T
    g, u = h @ Wg.T, h @ Wu.T
    J_dh = (derivative_of(F.silu, g) * u * (dh @ Wg.T) + F.silu(g) * (dh @ Wu.T)) @ Wd.T
    steering, _ = first_order(model, batches(), blocks=[2])
    assert steering["source"] == "adapter"
    np.testing.assert_allclose(steering["predicted"], np.array(steering["scale"]) * rms(J_dh), rtol=1e-8)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_no_batching_changes_the_prediction(family):
    both = ("left", "reordered")
    found = [first_order(double_model(family), batches(name), scales=(1e-2,), blocks=[1]) for name in both]
    for rows in zip(*found, strict=True):
        for row in rows[1:]:
            assert row["predicted"] == pytest.approx(rows[0]["predicted"], rel=1e-6)
        assert rows[0]["predicted"][0] > 0


def test_lora_on_an_mlp_whose_layers_are_children_of_the_block():
    config = LoraConfig(r=2, target_modules=["fc1", "fc2"], init_lora_weights=False)
    model = with_adapter(double_model("opt", activation_function="gelu"), config)
    block = model.get_base_model().model.decoder.layers[0]
    h = states_at_mlp(double_model("opt", activation_function="gelu"), 0)
    inner = F.gelu(F.linear(h, block.fc1.get_base_layer().weight, block.fc1.get_base_layer().bias))
    _, weights = first_order(model, batches(), blocks=[0])
    assert weights["last_layer"] == pytest.approx(rms(inner @ block.fc2.get_delta_weight("default").T), rel=1e-8)
    assert weights["slope"] == pytest.approx(2, abs=0.1)


def test_the_model_keeps_its_dtype_and_hooks():
    model = adapted_model("post_mlp-low_rank").float()
    before = model(**batches()[0]).logits
    first_order(model, batches())
    assert torch.equal(model(**batches()[0]).logits, before)


def test_no_batches_are_an_error():
    with pytest.raises(ValueError, match="no prompts"):
        first_order(double_model(), [])
