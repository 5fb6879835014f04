"""The recipes for the paper's Table 3, through the parser of `trl-steer sft`."""

from pathlib import Path

import pytest

import trl_steer.integrations
from trl_steer.integrations.trl import sft

FOLDER = Path(trl_steer.integrations.__path__[0], "trl", "recipes")
ROWS = {
    "steering_linear": {"r": 16, "activation": None},
    "steering_silu": {"r": 16, "activation": "silu"},
    "lora_r8": {"r": 8},
    "lora_r16": {"r": 16},
    "full_sft": None,
}


@pytest.mark.parametrize("row", ROWS)
def test_a_recipe_is_the_papers_setting(row, tmp_path):
    recipe = FOLDER / f"alpaca_llama31_8b_{row}.yaml"
    script, training, model, *_, steering = sft.parse(["--config", str(recipe), "--use_cpu", "--bf16", "false"])
    assert model.model_name_or_path == "meta-llama/Llama-3.1-8B"
    assert (script.task, training.num_train_epochs, training.max_length) == ("alpaca", 3, 512)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    adapter = sft.peft_config(steering)
    if row.startswith("steering"):
        assert {name: getattr(adapter, name) for name in ROWS[row]} == ROWS[row]
        assert (training.learning_rate, training.lr_scheduler_type) == (2e-3, "constant")
        assert not model.use_peft
    else:
        assert adapter is None
        assert model.use_peft == (ROWS[row] is not None)
        if ROWS[row]:
            assert (model.lora_r, model.lora_target_modules) == (ROWS[row]["r"], "all-linear")


def test_every_alpaca_recipe_is_a_row_of_the_table():
    found = {path.stem.removeprefix("alpaca_llama31_8b_") for path in FOLDER.glob("alpaca_*.yaml")}
    assert found == set(ROWS)
