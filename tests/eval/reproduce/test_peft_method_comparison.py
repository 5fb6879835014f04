"""The experiments for PEFT's comparison of methods: folders that stock PEFT reads without an import of ours."""

import json
import subprocess
import sys

import pytest
from checkout import CHECKOUT

EXPERIMENTS = sorted((CHECKOUT / "eval/reproduce/peft_method_comparison/experiments").glob("*/*"))
CODE = """
import sys
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
config = PeftConfig.from_pretrained(sys.argv[1])
print(config.peft_type.value, get_peft_model(model, config).get_nb_trainable_parameters()[0])
"""
PARAMETERS = {"llama-3.2-3B-rank32": 2 * 2 * 32 * 32, "llama-3.2-3B-vector": 2 * 32}


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_is_read_by_stock_peft(folder):
    printed = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    assert printed == f"POST_BLOCK_STEERING {PARAMETERS[folder.name]}\n"
    assert folder.parent.name == "post_block_steering"
    # As their `TrainConfig` has it: all other values are those of their default_training_params.json.
    training = json.loads((folder / "training_params.json").read_text())
    assert training.keys() == {"optimizer_kwargs"}
    assert training["optimizer_kwargs"].keys() == {"lr", "weight_decay"}


def test_there_are_two_experiments():
    assert {folder.name for folder in EXPERIMENTS} == PARAMETERS.keys()
