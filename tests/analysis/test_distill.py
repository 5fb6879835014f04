"""Distillation finds the adapter that made the difference between two models."""

import numpy as np
import pytest
import torch
from analysis_cases import EVERY_FAMILY
from model_pairs import left_padded, split_of, steered_model, token_rows, tuned_model
from model_zoo import tiny_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from steering_cases import weights_of

from trl_steer import PostBlockSteeringConfig
from trl_steer.analysis import Split, distill, record
from trl_steer.analysis.moments import Moments
from trl_steer.analysis.regression import fit

LAST = 2


def distance(model, goal, batches) -> float:
    """Of the last block's output, relative to the norm of the goal's (of root mean squares over tokens)."""
    square = {"distance": 0.0, "goal": 0.0}
    for batch in batches:
        ours, theirs = (record(each, batch, ["post_block"])[LAST, "post_block"] for each in (model, goal))
        square["distance"] += (ours - theirs).square().sum().item()
        square["goal"] += theirs.square().sum().item()
    return (square["distance"] / square["goal"]) ** 0.5


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_known_steering_adapter_is_recovered(family):
    goal, split = steered_model(family), split_of(token_rows(48))
    made = distill(tiny_model(family), goal, split, PostBlockSteeringConfig(r=3, task_type="CAUSAL_LM"))
    assert all(row["after"] < 1e-3 < row["before"] for row in made.report)
    assert distance(made.model, goal, split.held_out) < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_known_vector_is_recovered(family):
    goal, split = steered_model(family, steering_type="vector"), split_of(token_rows(30))
    config = PostBlockSteeringConfig(steering_type="vector", task_type="CAUSAL_LM", scaling=0.5)
    made = distill(tiny_model(family), goal, split, config)
    assert distance(made.model, goal, split.held_out) < 1e-3
    for name, parameter in goal.named_parameters():
        if "vector" in name:
            torch.testing.assert_close(made.model.get_parameter(name) * 0.5, parameter, rtol=1e-3, atol=1e-4)


def test_known_ranks_are_found_and_saved(tmp_path):
    pattern = {"layers.0": 4, "layers.1": 1, "layers.2": 2}
    goal, split = steered_model(rank_pattern=pattern), split_of(token_rows(48))
    config = PostBlockSteeringConfig(r=6, task_type="CAUSAL_LM")
    made = distill(tiny_model(), goal, split, config, choose_rank=True)
    assert [row["rank"] for row in made.report] == [4, 1, 2]
    made.model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert (saved.r, saved.rank_pattern) == (4, {"model.layers.1": 1, "model.layers.2": 2})
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert distance(loaded, goal, split.held_out) < 1e-3


def test_ranks_can_be_given():
    config = PostBlockSteeringConfig(r=2, rank_pattern={"layers.1": 3}, task_type="CAUSAL_LM")
    made = distill(tiny_model(), tuned_model(), split_of(token_rows(48)), config, ridges=(1e-3,))
    assert [row["rank"] for row in made.report] == [2, 3, 2]


def test_only_chosen_blocks_have_an_update():
    goal, split = steered_model(layers_to_transform=[1]), split_of(token_rows(60))
    config = PostBlockSteeringConfig(r=3, task_type="CAUSAL_LM", layers_to_transform=[1])
    made = distill(tiny_model(), goal, split, config)
    assert [row["block"] for row in made.report] == [1]
    assert distance(made.model, goal, split.held_out) < 1e-3


@pytest.mark.parametrize("relative", [True, False])
def test_blocks_are_fitted_on_steered_states(relative):
    """So the second block gets what a direct regression gives on the states with the update of the first one."""
    goal, split = tuned_model(), split_of(token_rows(48))
    config = PostBlockSteeringConfig(r=2, task_type="CAUSAL_LM")
    made = distill(tiny_model(), goal, split, config, relative=relative, ridges=(1e-6,))
    student = made.model
    layer = student.base_model.model.model.layers[1].post_block_steering
    layer.enable_adapters(False)
    x, y = (
        torch.cat([record(model, batch, ["post_block"])[1, "post_block"] for batch in split.fit]).numpy()
        for model in (student, goal)
    )
    layer.enable_adapters(True)
    factor = 1 / np.linalg.norm(y, axis=1, keepdims=True) if relative else 1
    x, y = factor * x, factor * (y - x)
    penalty = 1e-6 * np.square(x).sum() / x.shape[1]
    full = np.linalg.solve(x.T @ x + penalty * np.eye(32), x.T @ y)
    _, vectors = np.linalg.eigh(y.T @ x @ full)
    wanted = (full @ vectors[:, -2:] @ vectors[:, -2:].T).T
    adapter = layer.adapters["default"]
    found = (adapter.up.double() @ adapter.down.double()).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_the_batch_size_the_padding_and_the_order_do_not_matter():
    rows, goal = token_rows(60), tuned_model()
    config = PostBlockSteeringConfig(r=2, task_type="CAUSAL_LM")
    split = split_of(rows)
    other = Split(*(left_padded(batches)[::-1] for batches in split_of(rows, batch_size=3)))
    ours, theirs = (distill(tiny_model(), goal, each, config, ridges=(1e-3,)) for each in (split, other))
    for one, two in zip(ours.report, theirs.report, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_errors_do_not_compound():
    """Later blocks correct what earlier ones leave of the difference. A map for each block on its own does not."""
    goal, split = tuned_model(), split_of(token_rows(72))
    sequential = distill(tiny_model(), goal, split, PostBlockSteeringConfig(r=4, task_type="CAUSAL_LM")).model
    alone = get_peft_model(tiny_model(), PostBlockSteeringConfig(r=4, task_type="CAUSAL_LM")).eval()
    base = tiny_model()
    sums = {block: Moments(32, 32) for block in range(3)}
    for batch in split.fit:
        before, after = (record(model, batch, ["post_block"]) for model in (base, goal))
        for block, moments in sums.items():
            h = before[block, "post_block"]
            moments.add(h, after[block, "post_block"] - h)
    with torch.no_grad():
        for block, moments in sums.items():
            adapter = alone.base_model.model.model.layers[block].post_block_steering.adapters["default"]
            factors = fit(moments, 1e-4).of_rank(4)
            adapter.down.copy_(factors.down)
            adapter.up.copy_(factors.up)
    assert distance(sequential, goal, split.held_out) < distance(alone, goal, split.held_out)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
def test_a_known_lora_on_the_last_linear_layer_is_recovered(family):
    linear = {"gpt2": "mlp.c_proj", "opt": "fc2"}.get(family, "mlp.down_proj")
    config = LoraConfig(r=2, target_modules=[linear], init_lora_weights=False, task_type="CAUSAL_LM")
    goal, split = get_peft_model(tiny_model(family), config).eval(), split_of(token_rows(72))
    made = distill(tiny_model(family), goal, split, LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert distance(made.model, goal, split.held_out) < 1e-3


def test_steering_becomes_a_stock_lora_with_its_error(tmp_path):
    goal, split = steered_model(strength=0.1), split_of(token_rows(72))
    made = distill(tiny_model(), goal, split, LoraConfig(r=4, task_type="CAUSAL_LM"))
    made.model.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert made.report[-1]["after"] == pytest.approx(distance(loaded, goal, split.held_out), rel=1e-4)
    assert made.report[-1]["after"] < distance(tiny_model(), goal, split.held_out)


@pytest.mark.parametrize("family", ["gemma3", "mixtral", "qwen2_moe", "gemma3n", "opt_post_norm"])
def test_lora_is_refused_where_its_output_does_not_reach_the_residual_stream(family):
    base, before = tiny_model(family), weights_of(tiny_model(family))
    split = split_of(token_rows(30))
    with pytest.raises(ValueError, match=r"has no last linear layer|is not added to the residual stream"):
        distill(base, steered_model(family), split, LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert weights_of(base).keys() == before.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "silu"}, "linear steering of all tokens"),
        ({"positions": "last_prompt"}, "linear steering of all tokens"),
        ({"scaling": 0.0}, "linear steering of all tokens"),
    ],
)
def test_steering_without_a_closed_form_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        distill(tiny_model(), tuned_model(), split_of(token_rows(30)), PostBlockSteeringConfig(r=2, **change))


def test_wrong_models_are_refused():
    split, config = split_of(token_rows(30)), PostBlockSteeringConfig(r=2)
    with pytest.raises(ValueError, match="different shapes"):
        distill(tiny_model(), tiny_model("llama", num_hidden_layers=2), split, config)
    goal = steered_model()
    with pytest.raises(ValueError, match="the same object"):
        distill(goal.get_base_model(), goal, split, config)
    with pytest.raises(ValueError, match="low-rank steering only"):
        distill(tiny_model(), goal, split, PostBlockSteeringConfig(steering_type="vector"), choose_rank=True)


def test_after_an_error_the_base_model_has_no_adapter():
    base = tiny_model()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="do not determine a map"):
        distill(base, tuned_model(), split_of(token_rows(6, length=4)), PostBlockSteeringConfig(r=2), ridges=(0.0,))
    assert [name for name, _ in base.named_modules()] == before


def test_a_model_with_one_block_is_distilled_too():
    base, goal = (tiny_model("llama", num_hidden_layers=1) for _ in range(2))
    goal = get_peft_model(goal, PostBlockSteeringConfig(r=2, init_weights=False)).eval()
    made = distill(base, goal, split_of(token_rows(60)), PostBlockSteeringConfig(r=2))
    assert [row["block"] for row in made.report] == [0]
    assert made.report[0]["after"] < 1e-3
