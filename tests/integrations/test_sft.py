"""`trl-steer sft`: TRL's script and arguments, with steering on top."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file
from tiny_chat import tiny_model, tiny_tokenizer
from trl import SFTConfig

import trl_steer.integrations
from trl_steer.integrations.trl import sft

RECIPES = sorted(Path(trl_steer.integrations.__path__[0], "trl", "recipes").glob("*.yaml"))
ON_CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none"]


def parse(tmp_path, *argv):
    """Training arguments, and steering arguments."""
    parsed = sft.parse([*argv, "--output_dir", str(tmp_path), *ON_CPU])
    return parsed[1], parsed[-1]


@pytest.mark.parametrize("steering", ["low_rank", "vector"])
def test_rate_and_schedule_default_to_what_suits_the_steering(steering, tmp_path):
    training, _ = parse(tmp_path, "--steering", steering)
    assert training.learning_rate == sft.DEFAULTS[steering]["learning_rate"]
    assert training.lr_scheduler_type == "constant"
    assert training.weight_decay == training.warmup_steps == 0


def test_without_steering_the_defaults_are_those_of_trl(tmp_path):
    training, _ = parse(tmp_path, "--steering", "none")
    theirs = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert training.learning_rate == theirs.learning_rate
    assert training.lr_scheduler_type == theirs.lr_scheduler_type


def test_the_command_line_goes_before_the_config_file_and_both_before_our_default(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({"steering": "vector", "learning_rate": 0.25, "lr_scheduler_type": "cosine"}))
    training, steering = parse(tmp_path, "--config", str(config))
    assert (steering.steering, training.learning_rate, training.lr_scheduler_type) == ("vector", 0.25, "cosine")
    training, _ = parse(tmp_path, "--config", str(config), "--learning_rate", "0.125")
    assert (training.learning_rate, training.lr_scheduler_type) == (0.125, "cosine")


def test_every_steering_argument_reaches_the_adapter_configuration(tmp_path):
    _, steering = parse(
        tmp_path,
        *("--steering_r", "4", "--steering_activation", "silu", "--steering_scaling", "0.5"),
        *("--steering_dropout", "0.1", "--steering_init_scale", "0.01", "--steering_layers", "0", "2"),
    )
    config = sft.peft_config(steering)
    assert (config.steering_type, config.r, config.activation) == ("low_rank", 4, "silu")
    assert (config.scaling, config.dropout, config.init_scale) == (0.5, 0.1, 0.01)
    assert config.layers_to_transform == [0, 2]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_no_argument_that_the_parser_does_not_know(recipe, tmp_path):
    parsed = sft.parse(["--config", str(recipe), "--use_cpu", "--output_dir", str(tmp_path)])
    assert (sft.peft_config(parsed[-1]) is None) == (parsed[-1].steering == "none")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steering_r", "0"], "got 0"),
        (["--steering", "vector", "--steering_activation", "silu"], "activation"),
        (["--use_peft"], "--steering none for LoRA"),
        (["--steering_rank", "8"], "--steering_rank"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what(argv, said, tmp_path, capsys):
    assert sft.main([*argv, "--output_dir", str(tmp_path), *ON_CPU], "trl-steer sft") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("trl-steer sft: error: ")
    assert said in shown


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A config file as users write it: a tiny model, a JSON-lines file of prompts and completions."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} plus one is ", "completion": str(n + 1)} for n in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_name_or_path": str(folder / "model"),
        "datasets": [{"path": "json", "data_files": str(folder / "train.jsonl")}],
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def test_trains_and_saves_an_adapter_that_loads(recipe, tmp_path):
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path), "--steering_r", "2"]) == 0
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in weights.values())
    assert PeftConfig.from_pretrained(tmp_path).r == 2
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    state, base = model.get_base_model().state_dict(), tiny_model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())


def test_blocks_that_the_model_does_not_have_are_said_in_one_line(recipe, tmp_path, capsys):
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path), "--steering_layers", "0", "9"]) == 1
    said = capsys.readouterr().err
    assert "error: layers_to_transform names blocks [9]" in said
    assert "Traceback" not in said


def test_steering_none_leaves_lora_to_trl(recipe, tmp_path):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--steering", "none", "--use_peft"]
    assert sft.main([*argv, "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]) == 0
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "LORA"


def test_trains_under_accelerate_launch(recipe, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    module = ["-m", "trl_steer.integrations.trl.sft", "--config", str(recipe), "--output_dir", str(tmp_path)]
    ran = subprocess.run([*launch, *module], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_run_that_ends_in_nan_is_stopped_and_advised(recipe, tmp_path, capsys):
    argv = [
        "--config",
        str(recipe),
        "--output_dir",
        str(tmp_path),
        "--learning_rate",
        "1e38",
        "--num_train_epochs",
        "4",
    ]
    assert sft.main(argv) == 1
    assert "Lower the learning rate, which is 1e+38" in capsys.readouterr().err
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_run_that_ends_in_nan_saves_nothing_where_nothing_is_logged_either(recipe, tmp_path, capsys):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--learning_rate", "1e38", "--max_steps", "6"]
    assert sft.main([*argv, "--logging_strategy", "no", "--save_steps", "5"]) == 1
    assert "trained parameters are NaN or infinite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_loss_of_the_first_step_is_logged_so_that_a_rise_is_seen(recipe, tmp_path):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "4", "--logging_steps", "4"]
    assert sft.main([*argv, "--save_strategy", "steps", "--save_steps", "4"]) == 0
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 4]


@pytest.mark.parametrize("given_by", ["argument", "config file"])
def test_options_of_the_launcher_start_the_command_again_under_it(given_by, recipe, tmp_path, monkeypatch, capfd):
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path / "out")]
    if given_by == "argument":
        argv += ["--num_processes", "1", "--num_machines", "1"]
    else:
        with_option = tmp_path / "recipe.yaml"
        with_option.write_text(f"{recipe.read_text()}\naccelerate_config: single_gpu\n")
        argv[1] = str(with_option)
    monkeypatch.setattr(sft, "run", lambda *_: pytest.fail("trained in this process"))
    assert sft.main(argv) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_arguments_that_neither_the_command_nor_the_launcher_knows_are_refused(recipe, tmp_path, capsys):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--num_processes", "1", "--steering_rank", "8"]
    assert sft.main(argv) == 2
    assert "unknown arguments --steering_rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [("steering: vectr", "'vectr' is unknown"), ("steering: null", "None is unknown"), ("steering_r: 4.5", "integer")],
)
def test_wrong_values_in_a_config_file_are_said_in_one_line(line, said, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(f"{line}\n")
    assert sft.main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path), *ON_CPU]) == 2
    assert said in capsys.readouterr().err
