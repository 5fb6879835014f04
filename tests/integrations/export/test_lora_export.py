"""Linear steering as LoRA on a layer `post_block_steering`."""

import copy
import json

import pytest
import torch
from model_zoo import tiny_inputs, tiny_model
from peft import PeftModel
from saved_adapters import JOINT, LOW_RANK, SILU, VECTOR, logits_of, steer
from torch import nn

from trl_steer.integrations.export.lora import export_lora

IDS = tiny_inputs()["input_ids"][0].tolist()


class Zeros(nn.Linear):
    """A layer without weights of its own, as an engine would have it."""

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)
        nn.init.zeros_(self.weight)


def with_layers(model):
    """The model, in which each block adds the output of such a layer."""
    for block in model.model.layers:
        block.post_block_steering = Zeros(model.config.hidden_size)
        block.register_forward_hook(lambda module, args, output: output + module.post_block_steering(output))
    return model


@pytest.mark.parametrize("ranks", [None, {"layers.1": 5}], ids=["one rank", "several ranks"])
def test_lora_on_a_layer_of_zeros_computes_what_the_adapter_computes(ranks, tmp_path):
    config = copy.deepcopy(LOW_RANK)
    config.rank_pattern = ranks
    expected = logits_of(steer(tiny_model(), config, tmp_path / "adapter"), IDS)
    export_lora(str(tmp_path / "adapter"), tmp_path / "lora", overwrite=False)
    loaded = PeftModel.from_pretrained(with_layers(tiny_model()), tmp_path / "lora").eval()
    torch.testing.assert_close(logits_of(loaded, IDS), expected, atol=1e-5, rtol=0)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    rank = 3 if ranks is None else 5
    assert (written["r"], written["lora_alpha"]) == (rank, pytest.approx(0.7 * rank))
    assert written["target_modules"] == ["post_block_steering"]


@pytest.mark.parametrize(
    ("config", "message"),
    [(SILU, "LoRA is linear"), (VECTOR, "LoRA has no constant"), (JOINT, "Split it first")],
    ids=["silu", "vector", "joint"],
)
def test_what_lora_cannot_express_is_refused(config, message, tmp_path):
    steer(tiny_model(), config, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export_lora(str(tmp_path / "adapter"), tmp_path / "lora", overwrite=False)
    assert not (tmp_path / "lora").exists()
