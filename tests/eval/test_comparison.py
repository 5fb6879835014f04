"""The comparisons of methods: what counts as a difference, and that the whole of it runs."""

import json

import pytest
import tiny_runs

from trl_steer.eval import runs
from trl_steer.eval.experiments import comparison
from trl_steer.eval.experiments.comparison import COMPARISONS, difference
from trl_steer.files import write_json

JOINT = COMPARISONS["joint_comparison"]
METHODS = JOINT.methods


def summary(row):
    return {"differences": {method: row for method in METHODS if method != JOINT.ours}}


def verdict(row):
    return comparison.verdict(summary(row), JOINT)


def answers(*shares, total=200):
    """For each share a list of that many correct answers, the first ones."""
    return [[index < share * total for index in range(total)] for share in shares]


def test_equal_answers_differ_by_nothing():
    row = difference(answers(0.5, 0.6), answers(0.5, 0.6))
    assert row["difference"] == 0.0
    assert row["interval_95_examples"] == [0.0, 0.0]
    assert row["p_value"] == 1.0
    assert verdict(row).count("does not differ beyond noise") == len(METHODS) - 1


def test_a_difference_larger_than_both_kinds_of_noise_is_one():
    ours, theirs = answers(0.6, 0.62, 0.61), answers(0.4, 0.41, 0.42)
    row = difference(ours, theirs)
    assert row["difference"] == pytest.approx(0.2)
    assert row["p_value"] < 1e-6
    assert row["interval_95_examples"][0] > 0.15
    assert row["interval_95_seeds"][0] > 0.15
    assert verdict(row).count(" beats ") == len(METHODS) - 1
    assert verdict(difference(theirs, ours)).count(" is worse than ") == len(METHODS) - 1


def test_a_difference_that_changes_its_sign_with_the_seed_is_noise():
    row = difference(answers(0.9, 0.3, 0.6), answers(0.3, 0.6, 0.5))
    assert row["p_value"] < 0.01
    assert row["interval_95_seeds"][0] < 0 < row["interval_95_seeds"][1]
    assert verdict(row).count("does not differ beyond noise") == len(METHODS) - 1


def test_one_seed_says_nothing_about_seeds():
    assert difference(answers(0.9), answers(0.1))["interval_95_seeds"] == [float("-inf"), float("inf")]


@pytest.fixture
def model(tmp_path):
    return tiny_runs.save_checkpoint(tmp_path / "model")


@pytest.fixture
def arguments(model, tmp_path):
    return ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results"), "--model", model, "--fast"]


@pytest.mark.parametrize(
    "name",
    [
        "joint_comparison",
        *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(COMPARISONS) - {"joint_comparison"})),
    ],
)
def test_comparison_trains_scores_and_reports_each_method(name, arguments, tmp_path):
    assert comparison.main([name, *arguments, "--seeds", "3"]) == 0
    results = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    methods = COMPARISONS[name].methods
    assert results["seeds"] == [3]
    assert set(results["methods"]) == set(methods)
    sizes = {method: row["trainable_parameters"] for method, row in results["methods"].items()}
    if name == "joint_comparison":
        assert sizes["joint"] == sizes["joint_orth"] == sizes["lora"] + sizes["low_rank"]
    table = (tmp_path / "results" / f"{name}.md").read_text()
    assert all(f"| {shown} |" in table for shown in methods.values())
    adapters = {path.read_bytes() for path in (tmp_path / "runs").glob("*/adapter/adapter_model.safetensors")}
    assert len(adapters) == len(methods)


def test_a_seed_for_which_a_run_fails_is_left_out_and_stops_no_other(arguments, tmp_path, monkeypatch, capfd):
    made = []

    def make(settings, folder, report):
        if (settings.method, settings.seed) == ("joint", 0):
            raise runs.RunError("Training diverged.")
        run = runs.Run(folder)
        write_json(run.folder / "training.json", {"trainable_parameters": 1})
        write_json(run.scores_file(settings.task), {"examples": [{"correct": True}, {"correct": False}]})
        made.append(folder.name)
        return run

    monkeypatch.setattr(runs, "make", make)
    assert comparison.main(["joint_comparison", *arguments, "--seeds", "0", "1"]) == 1
    assert len(made) == 2 * len(METHODS) - 1
    assert "joint-seed0 failed: Training diverged." in capfd.readouterr().out
    assert json.loads((tmp_path / "results" / "joint_comparison.json").read_text())["seeds"] == [1]
