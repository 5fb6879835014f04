"""`trl-steer find-lr` on a tiny model: a recommendation with its record and picture, and no rate that is run twice."""

import pytest
import tiny_runs

from trl_steer import files
from trl_steer.eval import runs
from trl_steer.eval.console import Report
from trl_steer.eval.reproduce import find_lr
from trl_steer.eval.reproduce.sweep import sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_runs.save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_find_lr_recommends_a_rate_and_goes_on_where_it_was(model, tmp_path, monkeypatch, capsys):
    argv = ["--model", model, "--method", "full", "--start", "1e-2", "--max-steps", "60", "--limit", "60"]
    argv += ["--output", str(tmp_path)]
    assert find_lr.main(argv) == 0
    said = capsys.readouterr().out
    record = files.read_json(tmp_path / "learning_rates.json")
    assert f"Recommended learning rate: {record['rate']:g} (accuracy {record['score']:.3f})" in said
    scores = {row["rate"]: row["accuracy"] for row in record["rates"]}
    assert len(scores) >= 9
    assert record["score"] == max(score for score in scores.values() if score is not None) > 0
    assert (tmp_path / "learning_rates.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("runs/*/model"))
    monkeypatch.setattr(runs, "make", None)
    assert find_lr.main(argv) == 0
    assert files.read_json(tmp_path / "learning_rates.json") == record


def test_a_failure_is_a_line_and_the_rate_is_tried_again(model, tmp_path, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise runs.RunError("No memory.")

    monkeypatch.setattr(runs, "make", fail)
    for _ in range(2):
        assert find_lr.main(["--model", model, "--output", str(tmp_path)]) == 1
        said = capfd.readouterr()
        assert said.err == "trl-steer find-lr: error: No memory.\n"
        assert said.out.startswith("rate 0.002 ...\n")


def test_losses_reach_the_pruner(tmp_path):
    reported = []

    class Console(Report):
        def progress(self, done, total, note=""):
            reported.append((done, total))

    def objective(trial, rate):
        reporting = find_lr._Reporting(trial, Console())
        reporting.progress(1, 2)
        for step in range(4):
            reporting.loss(step, abs(rate - 2e-3))
        return rate

    scores = sweep(objective, tmp_path, "losses", 2e-3, lambda rate: None)
    assert reported == [(1, 2)] * len(scores)
    assert None in scores.values()
    assert scores[2e-3] == 2e-3
