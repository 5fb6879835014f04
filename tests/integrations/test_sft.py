"""`trl-steer sft` trains what it is asked to, and says what goes wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from safetensors.torch import load_file
from tiny_chat import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_steer import LofitConfig, PenaltyCallback, PostBlockSteeringConfig
from trl_steer.integrations.trl import sft
from trl_steer.integrations.trl.data import without_end_token
from trl_steer.tuners.joint_steering import OrthogonalityConstraint


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


def test_sft_trains_and_saves_an_adapter_that_loads(recipe, tmp_path):
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path), "--steering_r", "2"]) == 0
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in weights.values())
    assert PeftConfig.from_pretrained(tmp_path).r == 2
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    state, base = model.get_base_model().state_dict(), tiny_model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("method", ["low_rank", "joint"])
def test_training_starts_from_an_adapter_and_has_its_structure(method, recipe, tmp_path):
    first, second = str(tmp_path / "first"), tmp_path / "second"
    config = PostBlockSteeringConfig(r=3, activation="silu", rank_pattern={"layers.1": 1}, init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(recipe.parent / "model"), config).save_pretrained(first)
    argv = ["--config", str(recipe), "--method", method, "--init_from", first, "--output_dir", str(second)]
    assert sft.main([*argv, "--max_steps", "1", "--learning_rate", "1e-12"]) == 0
    saved = load_file(second / "adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "first" / "adapter_model.safetensors").items():
        leaf = key if method == "low_rank" else key.replace(".steering_adapter", ".lora_steering_adapter")
        torch.testing.assert_close(saved[leaf], tensor)


def test_an_adapter_that_training_cannot_start_from_is_an_error_of_one_line(recipe, tmp_path, capsys):
    config = PostBlockSteeringConfig(r=3)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "first")
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path / "new"), "--init_from"]
    assert sft.main([*argv, str(tmp_path / "first"), "--steering_r", "2"]) == 1
    assert "its r is 3, but the new adapter has 2. Set r=3" in capsys.readouterr().err
    assert sft.main([*argv, str(recipe.parent / "model")]) == 2
    said = capsys.readouterr().err
    assert "--init_from:" in said
    assert "there is no adapter_config.json" in said


def test_missing_blocks_are_an_error_of_one_line(recipe, tmp_path, capsys):
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path), "--steering_layers", "0", "9"]) == 1
    said = capsys.readouterr().err
    assert "error: layers_to_transform contains [9]" in said
    assert "Traceback" not in said


def test_an_adapter_with_a_penalty_is_trained_under_it(recipe, tmp_path, monkeypatch):
    steps = []
    config = LofitConfig(phase="scale", task_type="CAUSAL_LM")
    monkeypatch.setattr(sft, "peft_config", lambda *_: config)
    monkeypatch.setattr(PenaltyCallback, "on_pre_optimizer_step", lambda *args, **kwargs: steps.append(args[2]))
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "2"]) == 0
    assert len(steps) == 2
    monkeypatch.undo()
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path / "other"), "--max_steps", "2"]) == 0
    assert len(steps) == 2


METHODS = {
    "vector": ("POST_BLOCK_STEERING", []),
    "sublayer": ("SUBLAYER_STEERING", ["--site", "pre_mlp"]),
    "loreft": ("LOREFT", ["--site", "post_mlp"]),
    "lofit": ("LOFIT", []),
    "jola": ("JOLA", []),
    "lora": ("LORA", ["--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]),
    "joint": ("JOINT_STEERING", ["--lora_r", "2"]),
    "joint_orth": ("JOINT_STEERING", ["--lora_r", "2", "--steering_r", "2"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_its_adapter(method, recipe, tmp_path):
    peft_type, more = METHODS[method]
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--method", method, "--max_steps", "2"]
    assert sft.main([*argv, *more]) == 0
    assert PeftConfig.from_pretrained(tmp_path).peft_type == peft_type
    AutoPeftModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["loreft", "low_rank", "jola"])
def test_positions_reach_training_on_prompts_and_completions(method, recipe, tmp_path):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--method", method, "--max_steps", "2"]
    assert sft.main([*argv, "--positions", "f2+l2"]) == 0
    assert PeftConfig.from_pretrained(tmp_path).positions == "f2+l2"


def test_method_full_trains_the_weights_of_the_model(recipe, tmp_path):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--method", "full", "--max_steps", "2"]
    assert sft.main(argv) == 0
    trained, base = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), tiny_model().state_dict()
    assert not torch.equal(trained["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_joint_is_short_for_joint_orth(recipe, tmp_path):
    argv = ["--config", str(recipe), "--max_steps", "3", "--save_strategy", "no"]
    assert sft.joint([*argv, "--output_dir", str(tmp_path / "joint")]) == 0
    assert sft.main([*argv, "--output_dir", str(tmp_path / "sft"), "--method", "joint_orth"]) == 0
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("joint", "sft"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "joint")
    assert OrthogonalityConstraint(model, "default").measure().max_overlap < 1e-5


def test_number_of_trained_parameters_is_printed(recipe, tmp_path, capsys):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "1"]
    assert sft.main([*argv, "--method", "vector"]) == 0
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert f"{sum(tensor.numel() for tensor in weights.values()):,} of" in capsys.readouterr().out


def test_dataset_name_can_be_a_file(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    data, model = values["datasets"][0]["data_files"], values["model_name_or_path"]
    argv = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path), "--max_steps", "1"]
    assert sft.main(argv) == 0  # precision and device are chosen by what is there
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_end_token_can_be_left_out_of_training(recipe):
    tokenizer = tiny_tokenizer()
    row = without_end_token({"prompt": "1 plus one is ", "completion": "2"}, tokenizer)
    assert tokenizer.eos_token_id not in row["input_ids"]
    trained = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(trained).strip() == "2"


def test_resuming_skips_a_checkpoint_half_written_by_a_killed_run(recipe, tmp_path, caplog):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "4"]
    argv += ["--save_strategy", "steps", "--save_steps", "2"]
    assert sft.main(argv) == 0
    undisturbed = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, ')
    (tmp_path / "adapter_model.safetensors").unlink()
    assert sft.main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert "checkpoint-4, which is incomplete" in caplog.text
    resumed = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in undisturbed.items():
        torch.testing.assert_close(resumed[key], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["low_rank", "full"])
def test_resuming_at_the_last_step_trains_no_further_step(method, recipe, tmp_path):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "3", "--method", method]
    argv += ["--save_strategy", "steps", "--save_steps", "3"]
    assert sft.main(argv) == 0
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    undisturbed = load_file(tmp_path / name)
    (tmp_path / name).unlink()
    assert sft.main([*argv, "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(tmp_path / name)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in undisturbed.items())
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--steering_activation", "swishy"], "got 'swishy'"),
        (["--steering_r", "0"], "got 0"),
        (["--method", "vector", "--steering_activation", "silu"], "activation"),
        (["--dataset_train_split", "training"], "no split training"),
        (["--dataset_test_split", "nope", "--eval_strategy", "steps"], "no split nope"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--steering_rank", "8"], "--steering_rank"),
    ],
)
def test_errors_of_the_libraries_are_one_line(argv, said, recipe, tmp_path, capsys):
    assert sft.main(["--config", str(recipe), "--output_dir", str(tmp_path), *argv], "trl-steer sft") != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("trl-steer sft: error: ")
    assert said in lines[-1]


def test_debug_shows_the_traceback(recipe, tmp_path):
    with pytest.raises(ValueError, match="swishy"):
        sft.main(
            ["--config", str(recipe), "--output_dir", str(tmp_path), "--steering_activation", "swishy", "--debug"]
        )


@pytest.mark.slow  # test_num_processes_2_on_a_cpu_starts_two_processes takes the same way
def test_sft_trains_under_accelerate_launch(recipe, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    module = ["-m", "trl_steer.integrations.trl.sft", "--config", str(recipe), "--output_dir", str(tmp_path)]
    ran = subprocess.run([*launch, *module], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_sft_stops_at_nan_with_advice(recipe, tmp_path, capsys):
    argv = [
        "--config",
        str(recipe),
        "--output_dir",
        str(tmp_path),
        "--learning_rate",
        "1e37",
        "--num_train_epochs",
        "4",
    ]
    assert sft.main(argv) == 1
    assert "Divide the learning rate of 1e+37" in capsys.readouterr().err
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_sft_with_nan_saves_nothing_even_without_logging(recipe, tmp_path, capsys):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--learning_rate", "1e37", "--max_steps", "6"]
    assert sft.main([*argv, "--logging_strategy", "no", "--save_steps", "5"]) == 1
    assert "parameters are NaN or infinite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_loss_of_the_first_step_is_logged_so_that_a_rise_is_seen(recipe, tmp_path):
    argv = ["--config", str(recipe), "--output_dir", str(tmp_path), "--max_steps", "4", "--logging_steps", "4"]
    assert sft.main([*argv, "--save_strategy", "steps", "--save_steps", "4"]) == 0
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 4]


@pytest.mark.slow  # test_num_processes_2_on_a_cpu_starts_two_processes takes the same way
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
    monkeypatch.setattr(sft, "train", lambda *_: pytest.fail("trained in this process"))
    assert sft.main(argv) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_num_processes_2_on_a_cpu_starts_two_processes(recipe, tmp_path):
    launched = {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"}  # where other tests in this process set them
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    command = [sys.executable, "-m", "trl_steer.cli", "sft", "--config", str(recipe), "--output_dir", str(tmp_path)]
    command += ["--num_processes", "2", "--main_process_port", "0"]  # any free port
    command += ["--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--save_strategy", "epoch"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    # 8 rows, 2 a process and step
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
