"""FSDP2 with two processes: the losses, weights and files of one process. torch's `fully_shard` runs on the CPU."""

import pytest
import torch
from joint_cases import overlap
from peft import PeftModel
from processes import run_in_world
from safetensors.torch import load_file
from sharded_training import CONFIGS, base_model, train, train_sharded_and_save

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    run_in_world(train_sharded_and_save, 2, folder)
    return folder


@pytest.fixture(scope="module")
def whole():
    return {kind: train(kind) for kind in CONFIGS}


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_are_those_of_one_process(kind, sharded, whole):
    losses = whole[kind][2]
    assert torch.load(sharded / kind / "losses.pt") == pytest.approx(losses, rel=0, abs=1e-10)
    assert abs(losses[-1] - losses[0]) > 1e-3


@pytest.mark.parametrize("way", ["gathered", "state_dict", "reloaded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_files_hold_the_whole_weights_of_one_process(kind, way, sharded, whole, tmp_path):
    whole[kind][0].save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    found = load_file(sharded / kind / way / "adapter_model.safetensors")
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("kind", CONFIGS)
def test_files_load_and_give_the_model_of_one_process(kind, sharded, whole):
    ids = torch.arange(1, 13)[None]
    loaded = PeftModel.from_pretrained(base_model(kind), sharded / kind / "gathered")
    with torch.no_grad():
        expected = whole[kind][0].eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(base_model(kind)(ids).logits, expected, atol=1e-3)


def test_projecting_after_an_evaluation_reaches_the_weights_that_are_saved(sharded):
    loaded = PeftModel.from_pretrained(base_model(), sharded / "evaluated")
    assert overlap(loaded) <= 1e-10
    assert all(p.norm() > 0 for name, p in loaded.named_parameters() if name.endswith(".up"))
