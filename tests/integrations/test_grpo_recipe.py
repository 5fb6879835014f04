"""The GRPO recipe: what it rewards, and that it trains as a program of its own."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from task_rows import write_hub
from tiny_chat import tiny_model, tiny_tokenizer

import trl_steer.integrations

RECIPE = Path(trl_steer.integrations.__path__[0], "trl", "recipes", "gsm8k_grpo.py")


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


@pytest.mark.parametrize(
    ("text", "format_", "accuracy"),
    [
        ("48/4 = 12.\nAnswer: 1,200", 1.0, 1.0),
        ("48/4 = 12.\nAnswer: 1200.0", 1.0, 1.0),
        ("Answer: 7", 1.0, 0.0),
        ("The answer is 1200.", 0.0, 1.0),
        ("I do not know.", 0.0, 0.0),
    ],
)
def test_rewards_are_the_readings_of_the_task(recipe, text, format_, accuracy):
    completions = [[{"role": "assistant", "content": text}]]
    assert recipe["format_reward"](completions) == [format_]
    assert recipe["accuracy_reward"](completions, answer=["1200"]) == [accuracy]


def test_the_recipe_trains_and_saves_an_adapter_that_loads(tmp_path):
    write_hub(tmp_path / "hub")
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = {
        "--config": RECIPE.with_suffix(".yaml"),
        "--model_name_or_path": tmp_path / "model",
        "--output_dir": tmp_path / "out",
        "--max_steps": 1,
        "--max_completion_length": 4,
        "--steering_r": 2,
        "--bf16": "false",
    }
    words = [str(word) for option in options.items() for word in option]
    ran = subprocess.run(
        [sys.executable, str(RECIPE), *words, "--use_cpu"], cwd=tmp_path / "hub", capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in weights.items() if key.endswith(".down")} == {2}
    logged = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0]
    assert {"rewards/format_reward/mean", "rewards/accuracy_reward/mean"} <= logged.keys()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
