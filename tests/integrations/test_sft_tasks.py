"""`trl-steer sft --task`: trains on the rows that the task holds for training, and stock lm-eval scores the others."""

from pathlib import Path

import pytest
import task_rows
from lm_eval.models.huggingface import HFLM
from scripted_models import SIX, evaluate
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer.integrations.trl import sft
from trl_steer.integrations.trl.arguments import SteeringArguments
from trl_steer.integrations.trl.data import load_task_rows
from trl_steer.tasks import load_task

BENCHMARKS = [task.removeprefix("steer_") for task in SIX]


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("TRL_STEER_HUB_MIRROR", raising=False)
    folder = task_rows.write_hub(tmp_path_factory.mktemp("hub"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def train(model_folder: str, output: Path, *arguments: str) -> int:
    size = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1"]
    where = ["--model_name_or_path", model_folder, "--output_dir", str(output), "--use_cpu", "--bf16", "false"]
    return sft.main([*where, *size, *arguments])


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_adapter_trained_on_a_task_is_scored_by_the_task_of_that_name(hub, model_folder, tmp_path, benchmark):
    assert train(model_folder, tmp_path, "--task", benchmark) == 0
    lm = HFLM(pretrained=model_folder, peft=str(tmp_path), batch_size=2, device="cpu")
    scores = evaluate(lm, [f"steer_{benchmark}"], limit=2)[f"steer_{benchmark}"]
    assert 0.0 <= scores["exact_match,strict"] <= 1.0
    assert lm.model.peft_config["default"].peft_type == "POST_BLOCK_STEERING"


def test_joint_adapter_is_trained_on_a_task_with_the_settings_of_the_authors_code(hub, model_folder, tmp_path):
    size = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--lora_r", "4", "--steering_r", "2"]
    where = ["--model_name_or_path", model_folder, "--output_dir", str(tmp_path), "--use_cpu"]
    assert sft.joint([*where, *size, "--task", "boolq", "--preset", "steerling"]) == 0
    lm = HFLM(pretrained=model_folder, peft=str(tmp_path), batch_size=2, device="cpu")
    assert 0.0 <= evaluate(lm, ["steer_boolq"], limit=2)["steer_boolq"]["exact_match,strict"] <= 1.0
    assert lm.model.peft_config["default"].peft_type == "JOINT_STEERING"


def test_rows_are_those_of_load_task(hub):
    rows = load_task_rows(SteeringArguments(task="gsm8k"), None, None)
    assert {k: v.to_list() for k, v in rows.items()} == {k: v.to_list() for k, v in load_task("gsm8k").items()}
    arguments = SteeringArguments(task="gsm8k", task_rows=3, task_conversational=True)
    limited = load_task_rows(arguments, None, None)
    assert len(limited["train"]) == 3
    assert limited["train"][0]["prompt"][0]["role"] == "user"


def test_dataset_name_and_config_name_another_copy(hub, tmp_path):
    task_rows.write_config(tmp_path / "mine", "small", {"train": 10, "validation": 4}, task_rows.rows_of("boolq"))
    rows = load_task_rows(SteeringArguments(task="boolq"), str(tmp_path / "mine"), "small")
    assert len(rows["test"]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "booq"], "no task 'booq'. Choose one of: boolq"),
        (["--task", "boolq", "--task_splits", "paper"], "must be one of default, steerling"),
        (["--task", "boolq", "--dataset_config", "nowhere"], "'nowhere' not found"),
        (["--task", "boolq", "--dataset_train_split", "training"], "no split training, only"),
        (["--task", "boolq", "--dataset_test_split", "nope", "--eval_strategy", "steps"], "no split nope, only"),
    ],
)
def test_invalid_task_arguments_are_one_line(hub, model_folder, tmp_path, capsys, arguments, said):
    assert train(model_folder, tmp_path, *arguments) != 0
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
