"""The demo's stages on a tiny model: what a run leaves, how it resumes, and what it says."""

import dataclasses
import json
import shlex
import shutil

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from tiny_chat import tiny_model, tiny_tokenizer

from trl_steer import files
from trl_steer.demo import model, report, run, score, settings, task, train
from trl_steer.statistics import exact_mcnemar
from trl_steer.tasks import listops
from trl_steer.tuners.joint_steering import OrthogonalityConstraint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(checkpoint):
    """More steps than lie between two checkpoints."""
    return settings.Settings(
        method="low_rank",
        model=str(checkpoint),
        seed=0,
        train_examples=24,
        held_out_examples=8,
        recipe=settings.RECIPES["low_rank"],
        batch_size=1,
    )


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    run.run(small, folder)
    return folder


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_results_an_adapter_and_the_task(finished, small):
    results = json.loads((finished / "results.json").read_text())
    assert results["settings"] == small.to_dict()
    assert set(results["accuracy"]) == {
        "base model",
        "low_rank",
        "majority answer",
        "largest digit",
        "root operator over all digits",
    }
    assert results["accuracy"]["low_rank"]["total"] == 8
    # 2 blocks, width 32, rank 8
    assert results["training"]["trainable_parameters"] == 2 * 2 * 8 * 32
    assert results["training"]["steps"] == 24
    assert results["training"]["tokens_per_second"] > 0
    assert results["adapter_bytes"] == len(adapter_bytes(finished))
    markdown = (finished / "results.md").read_text()
    assert "| low_rank |" in markdown
    assert results["command"] in markdown


def test_nothing_unfinished_is_left_behind(finished):
    assert {path.name for path in finished.iterdir()} == {
        "adapter",
        "base.json",
        "results.json",
        "results.md",
        "settings.json",
        "steered.json",
        "task",
    }


def test_the_adapter_folder_loads_on_the_base_model(finished):
    steered = PeftModel.from_pretrained(tiny_model(), str(finished / "adapter"))
    assert steered.peft_config["default"].r == 8
    assert any(
        tensor.abs().sum() > 0
        for name, tensor in load_file(finished / "adapter" / "adapter_model.safetensors").items()
        if name.endswith(".up")
    )


def test_the_printed_command_names_what_was_scored(finished, checkpoint):
    words = shlex.split(json.loads((finished / "results.json").read_text())["command"])
    assert words[:2] == ["lm_eval", "run"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--model_args"] == f"pretrained={checkpoint},peft={finished / 'adapter'},dtype=float32"
    assert options["--include_path"] == str(finished / "task")
    assert options["--tasks"] == "steer_demo_listops"


def test_running_again_repeats_nothing(finished, small, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if not path.name.startswith("results")}
    again = run.run(small, finished)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["accuracy"] == json.loads((finished / "results.json").read_text())["accuracy"]
    assert capsys.readouterr().out.count("already done") == 4


def test_a_missing_stage_alone_is_repeated(finished, small, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "steered.json").unlink()
    run.run(small, folder)
    assert files.read_json(folder / "steered.json") == files.read_json(finished / "steered.json") | {
        "lm_eval": files.read_json(folder / "steered.json")["lm_eval"]
    }
    assert adapter_bytes(folder) == adapter_bytes(finished)


@pytest.mark.parametrize(("method", "overlaps"), [("joint", True), ("joint_orth", False)])
def test_joint_methods_train_both_halves(method, overlaps, small, tmp_path):
    joint = dataclasses.replace(small, method=method, recipe=settings.RECIPES[method])
    task.write_task(joint, tmp_path / "task")
    train.train(joint, joint.model, tmp_path / "task", tmp_path / "checkpoints", tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    trained = {name for name, p in adapted.named_parameters() if p.abs().sum() > 0 and (".up" in name or "_B" in name)}
    assert any(".up" in name for name in trained)
    assert any(".lora_B." in name for name in trained)
    overlap = OrthogonalityConstraint(adapted, "default").project().max_overlap
    assert (overlap > 1e-3) is overlaps
    assert (overlap < 1e-5) is not overlaps


def test_interrupted_training_resumes_and_ends_in_the_same_adapter(finished, small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run.prepare_folder(small, folder)
    shutil.copytree(finished / "task", folder / "task")
    stages = (small, small.model, folder / "task", folder / "checkpoints", folder / "adapter")

    def interrupt(self, args, state, control, **kwargs):
        self.seconds = 100.0
        if state.global_step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(train._Progress, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train(*stages)
    assert not (folder / "adapter").exists()
    # What a kill during the writing of the next checkpoint leaves.
    (folder / "checkpoints" / "checkpoint-20").mkdir()
    assert train.newest_finished_checkpoint(folder / "checkpoints").endswith("checkpoint-15")

    train.train(*stages)
    assert adapter_bytes(folder) == adapter_bytes(finished)
    statistics = files.read_json(folder / "adapter" / train.STATISTICS)
    assert statistics["steps"] == 24
    assert statistics["seconds"] > 100
    assert not (folder / "checkpoints").exists()


def test_other_settings_start_anew_and_say_which(finished, small, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "notes.txt").write_text("mine")
    other = dataclasses.replace(small, seed=1, recipe=dataclasses.replace(small.recipe, learning_rate=0.5))
    run.prepare_folder(other, folder)
    said = capsys.readouterr().out
    assert "Starting anew" in said
    assert "seed was 0, now 1" in said
    assert f"recipe.learning_rate was {small.recipe.learning_rate}, now 0.5" in said
    assert {path.name for path in folder.iterdir()} == {"settings.json", "notes.txt"}
    assert files.read_json(folder / "settings.json") == other.to_dict()


@pytest.mark.parametrize("content", [None, "", "[]", '{"title": "mine"}', '{"program": "another"}'])
def test_a_folder_of_somebody_else_is_refused_untouched(content, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").write_text("precious")
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    assert run.main(["--output", str(tmp_path)]) == 1
    assert "is not empty and was not made by this demo" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_kill_while_an_old_run_is_removed_is_recovered_from(calls, finished, small, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    other = dataclasses.replace(small, seed=1)
    remove = shutil.rmtree
    left = iter(range(calls, 0, -1))

    def killed(path):
        if next(left, 0) == 1:
            (path / next(path.iterdir()).name).unlink(missing_ok=True)  # half of a folder
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as fault:
        fault.setattr(run.shutil, "rmtree", killed)
        try:
            run.prepare_folder(other, folder)
        except KeyboardInterrupt:
            assert not (folder / "adapter").exists()
    run.prepare_folder(small, folder)  # with the settings of the old run, of which nothing is taken for whole
    assert {path.name for path in folder.iterdir()} <= {"settings.json", *run.OURS}
    assert not (folder / "adapter").exists()
    assert not (folder / "task").exists()


def test_a_first_run_that_was_killed_while_it_wrote_its_settings_may_begin_again(small, tmp_path):
    (tmp_path / ".settings.json.1234.partial").write_text("{")
    run.prepare_folder(small, tmp_path)
    assert files.read_json(tmp_path / "settings.json")["seed"] == 0


def test_an_output_that_cannot_be_written_is_said_in_one_line(capsys):
    assert run.main(["--output", "/proc/nowhere"]) == 1
    assert "trl-steer demo: error: " in capsys.readouterr().err


def test_the_printed_command_survives_commas(tmp_path):
    words = shlex.split(score.command("a,b=1", tmp_path, tmp_path))
    assert json.loads(words[words.index("--model_args") + 1])["pretrained"] == "a,b=1"


def test_output_that_is_a_file_is_refused(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run.main(["--output", str(tmp_path / "file")]) == 1
    assert "is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "lowrank"], "'low_rank'"),
        (["--seed", "-1"], "whole number"),
        (["--seed", "1.5"], "'1.5' is not a seed"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert said in capsys.readouterr().err


def test_a_model_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        model.resolve(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model.resolve(str(tmp_path / "absent"))


def test_the_data_is_in_prompt_completion_form_and_does_not_overlap(finished):
    rows = {name: files.read_jsonl(finished / "task" / name) for name in (task.TRAIN, task.HELD_OUT)}
    assert {name: len(found) for name, found in rows.items()} == {task.TRAIN: 24, task.HELD_OUT: 8}
    assert all(set(row) == {"prompt", "completion"} for found in rows.values() for row in found)
    prompts = [{row["prompt"] for row in found} for found in rows.values()]
    assert not prompts[0] & prompts[1]


def test_shortcuts_are_scored_on_the_held_out_examples(tmp_path):
    train_rows = [listops.example(text) for text in ("[MIN 1 5 ]", "[MAX 1 0 ]", "[MAX 9 [MIN 9 2 ] ]")]
    held_out = [
        listops.example(text) for text in ("[MIN 4 [MAX 1 0 ] ]", "[MAX 8 [MIN 1 2 ] ]", "[MIN 3 [MAX 2 7 ] ]")
    ]
    files.write_jsonl(tmp_path / task.TRAIN, train_rows)
    files.write_jsonl(tmp_path / task.HELD_OUT, held_out)
    # answers 1, 8, 3; the most frequent training answer is 1
    assert task.shortcuts(tmp_path) == {
        "majority answer": [True, False, False],
        "largest digit": [False, True, False],
        "root operator over all digits": [False, True, False],
    }


def test_accuracy_comes_with_standard_error_and_interval():
    row = report.accuracy([True] * 50 + [False] * 150)
    assert row["accuracy"] == 0.25
    assert row["standard_error"] == pytest.approx((0.25 * 0.75 / 200) ** 0.5)
    assert row["interval_95"] == pytest.approx([0.195, 0.314], abs=1e-3)


@pytest.mark.parametrize(("wins", "relation"), [(20, "is significantly above"), (3, "is not significantly above")])
def test_verdict_says_whether_steering_beats_the_majority_answer(wins, relation):
    ours, theirs = [True] * wins + [False] * 20, [False] * (wins + 20)
    results = {
        "settings": {"method": "vector"},
        "accuracy": {"vector": report.accuracy(ours), report.MAJORITY: report.accuracy(theirs)},
        "p_value": {f"vector above {report.MAJORITY}": exact_mcnemar(ours, theirs)},
    }
    assert relation in report.verdict(results)
