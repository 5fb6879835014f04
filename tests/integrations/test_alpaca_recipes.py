"""The recipes for the paper's Table 3, through the parser of `trl-steer sft`."""

from pathlib import Path

import pytest
from peft import LoraConfig

import trl_steer.integrations
from trl_steer.integrations.trl import sft
from trl_steer.integrations.trl.arguments import read

FOLDER = Path(trl_steer.integrations.__path__[0], "trl", "recipes")
ROWS = {
    "steering_linear": {"r": 16, "activation": None},
    "steering_silu": {"r": 16, "activation": "silu"},
    "lora_r8": {"r": 8},
    "lora_r16": {"r": 16},
    "full_sft": None,
}


@pytest.mark.parametrize("row", ROWS)
def test_alpaca_recipe_equals_the_papers_setting(row, tmp_path):
    recipe = FOLDER / f"alpaca_llama31_8b_{row}.yaml"
    argv = ["--config", str(recipe), "--use_cpu", "--bf16", "false"]
    request = read(argv)
    (_, training, model, *_), _ = sft.parse(request, argv)
    assert model.model_name_or_path == "meta-llama/Llama-3.1-8B"
    assert (request.ours.task, training.num_train_epochs, training.max_length) == ("alpaca", 3, 512)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    adapter = sft.peft_config(request, model)
    if row.startswith("steering"):
        assert {name: getattr(adapter, name) for name in ROWS[row]} == ROWS[row]
        assert (training.learning_rate, training.lr_scheduler_type) == (2e-3, "constant")
    elif ROWS[row]:
        assert type(adapter) is LoraConfig
        assert (adapter.r, adapter.target_modules) == (ROWS[row]["r"], "all-linear")
    else:
        assert adapter is None


def test_every_alpaca_recipe_is_a_row_of_the_table():
    found = {path.stem.removeprefix("alpaca_llama31_8b_") for path in FOLDER.glob("alpaca_*.yaml")}
    assert found == set(ROWS)
