"""`trl-steer demo`: what it shows, what it refuses, and that it stops and goes on."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_runs

from trl_steer.eval import console, runs
from trl_steer.eval.demo import cli, preset, report
from trl_steer.tasks import listops


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(preset, "FAST_TRAIN_EXAMPLES", 64)
    monkeypatch.setattr(preset, "FAST_HELD_OUT_EXAMPLES", 6)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of a run of the whole command, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "trl_steer.cli", "demo", "--fast", "--model", model, "--output", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return folder, shown


def test_demo_shows_steps_table_and_command_and_no_library_output(finished):
    folder, shown = finished
    assert shown.stderr == ""
    lines = shown.stdout.splitlines()
    assert "--fast only shows that everything works" in lines[0]
    assert "too short for a significant result" in lines[0]
    for number, name in enumerate(("Model", "Scoring the base model", "Training", "Scoring the adapter"), 1):
        assert any(line.startswith(f"{number} of 4  {name}: ") for line in lines)
    assert not any("{'loss'" in line or "Warning" in line or "onverting" in line for line in lines)
    assert any("│ low_rank" in line for line in lines)
    assert runs.Run(folder).command() in shown.stdout
    assert "'loss'" in (folder / "log").read_text()


def test_the_root_operator_is_explained_under_its_table(finished):
    folder, shown = finished
    text = " ".join(shown.stdout.split())
    assert text.index("│ root operator") < text.index(report.ROOT_MEANS) < text.index("trainable parameters")
    assert report.ROOT_MEANS in (folder / "results.md").read_text()


def test_demo_writes_its_table_to_a_file(finished):
    folder, _ = finished
    written = (folder / "results.md").read_text()
    assert "| low_rank |" in written
    assert runs.Run(folder).command() in written


def test_second_demo_run_shows_the_same_and_computes_nothing(finished, model, monkeypatch, capfd):
    folder, shown = finished
    monkeypatch.setattr(preset, "FAST_HELD_OUT_EXAMPLES", 50)
    monkeypatch.setattr(runs, "_make", None)
    assert cli.main(["--fast", "--model", model, "--output", str(folder)]) == 0
    again = capfd.readouterr().out
    assert "This run is already finished" in again
    assert again[again.index("Held-out") :] == shown.stdout[shown.stdout.index("Held-out") :]


def test_a_folder_with_a_run_of_other_settings_is_refused_and_overwritten_when_asked_for(
    finished, model, tmp_path, monkeypatch, capfd
):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    arguments = ["--fast", "--model", model, "--seed", "5", "--output", str(folder)]
    assert cli.main(arguments) == 1
    said = capfd.readouterr().err
    assert said.startswith("trl-steer demo: error: ")
    assert "seed 0, asked for 5" in said
    assert "--overwrite" in said
    assert said.count("\n") == 1
    made = []
    monkeypatch.setattr(runs, "_make", lambda run, *_: made.append(run.adapter.exists()))
    monkeypatch.setattr(report, "show", lambda _: None)
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert made == [False]


@pytest.fixture
def control_c_counts():
    """A shell's background jobs ignore it, and so would a test suite that is one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("control_c_counts")
def test_control_c_is_a_line_that_says_what_is_kept_and_how_to_go_on(model, tmp_path, monkeypatch, capfd):
    def interrupt(self, done, total, note=""):
        if (done, total) == (16, 32):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(preset, "FAST_TRAIN_EXAMPLES", 128)  # more steps than between checkpoints
    arguments = ["--fast", "--model", model, "--output", str(tmp_path / "run")]
    with monkeypatch.context() as fault:
        fault.setattr(console.Console, "progress", interrupt)
        assert cli.main(arguments) == 130
        said = capfd.readouterr().err.splitlines()[-1]  # below what goes to the log outside of a test
        assert "has the base model's score and training up to step 15." in said
        assert "The same command continues from there." in said
    assert cli.main(arguments) == 0
    assert "Resuming from step 15." in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "lowrank"], "'low_rank'"),
        (["--seed", "-1"], "expected an integer"),
        (["--seed", "1.5"], "got '1.5'"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "/proc/nowhere"], "/proc/nowhere"),
        (["--output", __file__], "is a file. Choose a folder"),
        (["--model", "./absent"], "There is no folder"),
    ],
)
def test_demo_errors_are_one_line(arguments, said, capfd):
    assert cli.main(arguments) == 1
    shown = capfd.readouterr().err
    assert shown.startswith("trl-steer demo: error: ")
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--seed", "x"], ["--model", "./absent"], ["--output", "/proc/x"]])
def test_help_and_refusals_import_nothing_heavy(arguments):
    code = f"""
import contextlib, sys
from trl_steer.cli import main
with contextlib.suppress(SystemExit):
    main({["demo", *arguments]!r})
print({{"torch", "peft", "datasets", "lm_eval", "transformers", "rich"}} & set(sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "set()"


def test_the_examples_follow_the_seed_and_held_out_ones_are_not_trained_on():
    made = preset.settings(seed=3)
    drawn = listops.generate_splits({"test": 200, "train": 480}, seed=3, max_tokens=12)
    rows = report.get_task(made.benchmark).rows(**made.source)
    assert {name: rows[name]["Source"][:] for name in drawn} == drawn
    assert not set(drawn["train"]) & set(drawn["test"])


def test_shortcuts_are_scored_on_the_held_out_examples(monkeypatch):
    splits = {
        "train": ("[MIN 1 5 ]", "[MAX 1 0 ]", "[MAX 9 [MIN 9 2 ] ]"),
        "test": ("[MIN 4 [MAX 1 0 ] ]", "[MAX 8 [MIN 1 2 ] ]", "[MIN 3 [MAX 2 7 ] ]"),
    }
    rows = {
        name: {"Source": list(drawn), "Target": [listops.evaluate(text) for text in drawn]}
        for name, drawn in splits.items()
    }
    task = dataclasses.replace(report.get_task("listops_synthetic"), splits={"default": lambda _: None})
    monkeypatch.setattr(type(task), "rows", lambda *_, **__: rows)
    # answers 1, 8, 3; the most frequent training answer is 1
    assert report.baselines("listops_synthetic", {}) == {
        "majority answer": [True, False, False],
        "largest digit": [False, True, False],
        "root operator over all digits": [False, True, False],
    }


def test_accuracy_comes_with_standard_error_interval_and_p_value():
    answers = {"vector": [True] * 50 + [False] * 150, report.MAJORITY: [False] * 200}
    rows = report.accuracy_rows("vector", answers)
    assert rows[0] == ("vector", "0.250 ± 0.031", "0.195 to 0.314", "")
    assert rows[1][0] == report.MAJORITY
    assert float(rows[1][3]) < 1e-10


@pytest.mark.parametrize(("wins", "relation"), [(20, "is significantly above"), (3, "is not significantly above")])
def test_the_verdict_says_whether_steering_beats_the_majority_answer(wins, relation):
    answers = {"vector": [True] * wins + [False] * 20, report.MAJORITY: [False] * (wins + 20)}
    assert relation in report.verdict("vector", answers)
