"""The experiments for PEFT's comparison of methods: folders that stock PEFT reads without an import of ours."""

import json
import subprocess
import sys

import pytest
from checkout import CHECKOUT

EXPERIMENTS = CHECKOUT / "eval/reproduce/peft_method_comparison/experiments"
CODE = """
import sys
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
for folder in sys.argv[1:]:
    config = PeftConfig.from_pretrained(folder)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)), config)
    print(config.peft_type.value, model.get_nb_trainable_parameters()[0])
"""


@pytest.mark.slow
def test_experiments_are_read_by_stock_peft():
    folders = sorted(EXPERIMENTS.glob("*/*"))
    assert [str(folder.relative_to(EXPERIMENTS)) for folder in folders] == [
        "post_block_steering/llama-3.2-3B-rank32",
        "post_block_steering/llama-3.2-3B-vector",
    ]
    printed = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, folders)], capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines() == [f"POST_BLOCK_STEERING {2 * 2 * 32 * 32}", f"POST_BLOCK_STEERING {2 * 32}"]
    for folder in folders:
        # All other values are those of their default_training_params.json.
        training = json.loads((folder / "training_params.json").read_text())
        assert training.keys() == {"optimizer_kwargs"}
        assert training["optimizer_kwargs"].keys() == {"lr", "weight_decay"}
