"""The similarity of the shifts of steering and LoRA equals a direct computation."""

import numpy as np
import pytest
import torch
from analysis_cases import BATCHINGS, TEXTS, adapted_model, batches, double_model, with_adapter
from peft import LoraConfig
from tuner_cases import FOUR_FAMILIES

from trl_steer.analysis import shift_similarity


def direct_similarity(model):
    """Cosines by block, for a Llama with linear low-rank steering, from its weights and two hooks."""
    cosines, kept = [[], [], []], {}
    blocks = model.get_base_model().model.layers
    for index, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda m, args, index=index: kept.update({("x", index): args[0]}))
        block.post_block_steering.register_forward_pre_hook(
            lambda m, args, index=index: kept.update({("h", index): args[0]})
        )
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
            for index, block in enumerate(blocks):
                (leaf,) = block.post_block_steering.adapters.values()
                x, h = kept["x", index][0], kept["h", index][0]
                steering = leaf.scaling * h @ leaf.down.T @ leaf.up.T
                plain, tuned = (mlp(block.mlp, x, lora) for lora in (False, True))
                cosines[index].append(torch.cosine_similarity(steering, tuned - plain, dim=1, eps=0))
    return [torch.cat(parts).numpy() for parts in cosines]


def mlp(module, x, lora):
    def linear(layer, value):
        weight = layer.get_base_layer().weight
        return value @ (weight + layer.get_delta_weight("default") if lora else weight).T

    gated = torch.nn.functional.silu(linear(module.gate_proj, x)) * linear(module.up_proj, x)
    return linear(module.down_proj, gated)


@pytest.mark.parametrize("name", BATCHINGS)
def test_similarity_is_the_cosine_of_the_two_shifts(name):
    model = adapted_model("joint-low_rank")
    found = shift_similarity(model, batches(name))
    direct = direct_similarity(model)
    for row, cosines in zip(found["blocks"], direct, strict=True):
        assert row["tokens"] == len(cosines) == 44
        assert row["mean"] == pytest.approx(cosines.mean(), abs=1e-8)
        assert row["mean_abs"] == pytest.approx(np.abs(cosines).mean(), abs=1e-8)
        assert row["std"] == pytest.approx(cosines.std(), abs=1e-8)
    everything = np.concatenate(direct)
    assert found["mean"] == pytest.approx(everything.mean(), abs=1e-8)
    np.testing.assert_array_equal(found["counts"], np.histogram(everything, found["edges"])[0])


@pytest.mark.parametrize("family", FOUR_FAMILIES)
@pytest.mark.parametrize("row", ["joint-low_rank", "joint-vector"])
def test_no_batching_changes_the_similarity(row, family):
    model = adapted_model(row, family)
    first, second = (shift_similarity(model, batches(name)) for name in ("alone", "left"))
    assert first["mean_abs"] == pytest.approx(second["mean_abs"], abs=1e-8)
    assert first["tokens"] == second["tokens"] == 3 * 44


def test_measuring_leaves_the_model_as_it_was():
    model = adapted_model("joint-low_rank")
    before = model(**batches()[0]).logits
    shift_similarity(model, batches())
    assert torch.equal(model(**batches()[0]).logits, before)
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__ == "LlamaMLP")


def test_an_adapter_that_is_not_joint_and_an_untrained_one_are_errors():
    with pytest.raises(ValueError, match="Expected a joint adapter with LoRA on the MLPs"):
        shift_similarity(adapted_model("low_rank"), batches())
    with pytest.raises(ValueError, match="Expected a joint adapter"):
        shift_similarity(with_adapter(double_model(), LoraConfig(target_modules=["down_proj"])), batches())
    with pytest.raises(ValueError, match="the adapter is untrained"):
        shift_similarity(adapted_model("joint-low_rank", fresh=True), batches())
