"""Stock `lm_eval`, in a process that does not know us, scores a steered model through `peft=FOLDER`."""

import json
import os
import signal
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


def test_stock_lm_eval_cli_scores_the_steered_model_as_its_api_does(folder, monkeypatch):
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


@pytest.mark.slow
def test_without_autoload_the_cli_fails_with_pefts_own_error(folder):
    process = run_lm_eval(folder, TRL_STEER_NO_AUTOLOAD="1")
    assert process.returncode != 0
    assert process.stderr.strip().splitlines()[-1] == "KeyError: 'POST_BLOCK_STEERING'"


def test_trl_steer_lm_eval_finds_its_tasks_and_those_of_the_user(folder):
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
def test_task_folder_goes_before_the_users_also_from_a_config_file(tmp_path, monkeypatch, written, given, expected):
    for folder in ("theirs", "one", "two", "given"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"model: dummy\ntasks: steer_boolq\n{written}\n")
    asked = []
    monkeypatch.setattr("lm_eval._cli.run.Run._execute", staticmethod(asked.append))
    option = ["--include_path", given] if given else []
    assert launcher.main(["run", "--config", str(tmp_path / "run.yaml"), *option]) == 0
    assert asked[0].include_path == [launcher.tasks_folder(), *expected]


def ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trl_steer.integrations.lm_eval.launcher", *arguments]


MODEL = "--model_args=pretrained={folder}/base"
WRONG = {
    "no task of that name": (["--tasks", "steer_test_task,nosuch_task", MODEL], "nosuch_task"),
    "part of a task's name": (["--tasks", "steer_test", MODEL], "steer_test"),
    "no tasks": ([MODEL], "--tasks"),
    "no model type of that name": (["--tasks", "steer_test_task", "--model", "hff"], "'hff'"),
    "no model": (["--tasks", "steer_test_task"], "pretrained=MODEL"),
    "no folder": (["--tasks", "steer_test_task", "--model_args=pretrained=/no/such"], "/no/such"),
    "a folder without a model": (
        ["--tasks", "steer_test_task", "--model_args=pretrained={folder}/tasks"],
        "config.json",
    ),
    "a folder without an adapter": (
        ["--tasks", "steer_test_task", MODEL + ",peft={folder}/base"],
        "adapter_config.json",
    ),
    "no such dtype": (["--tasks", "steer_test_task", MODEL + ",dtype=float17"], "float17"),
    "no such device": (["--tasks", "steer_test_task", MODEL, "--device", "gpu"], "device gpu"),
    "no batch size": (["--tasks", "steer_test_task", MODEL, "--batch_size", "many"], "batch_size many"),
    "no samples": (["--tasks", "steer_test_task", MODEL, "--samples", "{{rows"], "--samples"),
    "no limit": (["--tasks", "steer_test_task", MODEL, "--limit", "few"], "'few'"),
    "no config file": (["--config", "{folder}/none.yaml"], "none.yaml"),
    "a broken config file": (["--config", "{folder}/broken.yaml"], "broken.yaml"),
    "an unknown key in the config file": (["--config", "{folder}/unknown.yaml"], "taks"),
    "no folder of tasks": (["--tasks", "steer_test_task", MODEL, "--include_path", "/no/such"], "/no/such"),
    "no place for the samples": (["--tasks", "steer_test_task", MODEL, "--log_samples"], "--output_path"),
    "an unknown option": (["--task", "steer_test_task", "--nosuch"], "--nosuch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_request_is_one_line(folder, capfd, name):
    (folder / "broken.yaml").write_text("tasks: [a")
    (folder / "unknown.yaml").write_text("taks: [a]")
    options, cause = WRONG[name]
    include = [] if "--include_path" in options else ["--include_path", str(folder / "tasks")]
    try:
        status = launcher.main(["run", *include, *(option.format(folder=folder) for option in options)])
    except SystemExit as refused:  # by argparse
        status = refused.code
    printed = capfd.readouterr()
    assert status in (1, 2)
    assert printed.out == ""
    assert cause in printed.err
    assert len(printed.err.strip().splitlines()) <= 3, printed.err


def test_wrong_name_is_an_error_before_anything_heavy_is_imported():
    code = (
        "import sys; from trl_steer.integrations.lm_eval import launcher; "
        "status = launcher.main(['run', '--tasks', 'nosuch_task', '--model', 'dummy']); "
        "sys.exit('torch is loaded' if 'torch' in sys.modules else status)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 2, process.stderr
    assert "nosuch_task" in process.stderr


def test_later_error_is_one_line_and_debug_shows_the_traceback(folder, tmp_path, capfd):
    (tmp_path / "config.json").write_text("{}")
    command = ["run", "--tasks", "steer_test_task", "--include_path", str(folder / "tasks")]
    command.append(f"--model_args=pretrained={tmp_path}")
    assert launcher.main(command) == 1
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert "--debug" in printed.err.strip().splitlines()[-1]
    with pytest.raises(ValueError, match="model_type"):
        launcher.main([*command, "--debug"])


def test_interruption_is_one_line(folder):
    command = ours("run", "--tasks", "steer_test_task", "--include_path", str(folder / "tasks"), "--device", "cpu")
    command.append(MODEL.format(folder=folder))

    def can_be_interrupted():  # a shell's background job, and all that it starts, ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=can_be_interrupted) as process:
        for line in process.stderr:
            if "Selected Tasks" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "stopped" in rest.strip().splitlines()[-1]
