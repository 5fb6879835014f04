"""Stock `lm_eval`, in a process that does not know us, scores a steered model through `peft=FOLDER`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import PostBlockSteeringConfig
from trl_steer.integrations.lm_eval import launcher

pytest.importorskip("lm_eval")

# The mean log-likelihood, a number that any change of the model moves. (Perplexity proper is slow to bootstrap.)
TASK = """
task: steer_test_task
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - metric: perplexity
    aggregation: mean
    higher_is_better: true
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, an adapter that is not the identity, and a task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=4, activation="silu", init_weights=False)
    torch.manual_seed(0)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    rows = [{"question": f"{i} + {i} =", "answer": str(2 * i)} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "steer_test_task.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def run_lm_eval(folder: Path, **variables) -> subprocess.CompletedProcess:
    model_args = f"pretrained={folder / 'base'},dtype=float32,peft={folder / 'adapter'}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args]
    command += ["--include_path", str(folder / "tasks"), "--tasks", "steer_test_task", "--device", "cpu"]
    command += ["--batch_size", "2", "--output_path", str(folder / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def metrics(results: dict) -> dict[str, float]:
    task = results["results"]["steer_test_task"]
    return {name: task[f"{name},none"] for name in ("perplexity", "acc")}


def test_stock_cli_scores_the_steered_model_as_the_api_does(folder, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    process = run_lm_eval(folder)
    assert process.returncode == 0, process.stderr
    (file,) = (folder / "results").rglob("results_*.json")
    steered = metrics(json.loads(file.read_text()))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = PeftModel.from_pretrained(tiny_model(), str(folder / "adapter")).eval()
    language_model = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=2, device="cpu")
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def evaluate():
        return metrics(lm_eval.simple_evaluate(model=language_model, tasks=["steer_test_task"], task_manager=tasks))

    assert evaluate() == pytest.approx(steered, rel=1e-5)
    with model.disable_adapter():
        base = evaluate()
    assert abs(steered["perplexity"] - base["perplexity"]) > 1e-3 * abs(base["perplexity"])


def test_switched_off_the_cli_fails_with_pefts_own_error(folder):
    process = run_lm_eval(folder, TRL_STEER_NO_AUTOLOAD="1")
    assert process.returncode != 0
    assert process.stderr.strip().splitlines()[-1] == "KeyError: 'POST_BLOCK_STEERING'"


def test_our_program_finds_our_tasks_beside_those_of_the_user(folder):
    command = [sys.executable, "-m", "trl_steer.integrations.lm_eval.launcher", "run", "--model", "dummy"]
    command += ["--include_path", str(folder / "tasks"), "--tasks", "steer_listops_synthetic,steer_test_task"]
    command += ["--limit", "2", "--output_path", str(folder / "both")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment, timeout=300)
    (file,) = (folder / "both").rglob("results_*.json")
    assert set(json.loads(file.read_text())["results"]) == {"steer_listops_synthetic", "steer_test_task"}


@pytest.mark.parametrize(
    ("written", "given", "expected"),
    [
        ("", None, []),
        ("include_path: theirs", None, ["theirs"]),
        ("include_path: [one, two]", None, ["one", "two"]),
        ("include_path: theirs", "given", ["given"]),
    ],
)
def test_our_folder_goes_before_the_users_who_may_name_theirs_in_a_file(
    tmp_path, monkeypatch, written, given, expected
):
    (tmp_path / "run.yaml").write_text(f"model: dummy\n{written}\n")
    asked = []
    monkeypatch.setattr("lm_eval._cli.run.Run._execute", staticmethod(asked.append))
    option = ["--include_path", given] if given else []
    assert launcher.main(["run", "--config", str(tmp_path / "run.yaml"), *option]) == 0
    assert asked[0].include_path == [launcher.tasks_folder(), *expected]
