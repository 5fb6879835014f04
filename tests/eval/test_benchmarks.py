"""The benchmarks' harness, and that they run. No test looks at an absolute time."""

import json
import os

import pytest
import torch
from torch import nn

from trl_steer.eval.benchmarks import harness, models, report
from trl_steer.eval.benchmarks.__main__ import main
from trl_steer.eval.benchmarks.harness import Result, alternate, compare, quartiles
from trl_steer.eval.benchmarks.memory import saved_bytes
from trl_steer.eval.benchmarks.registry import BENCHMARKS


def result(ratio, bound=None):
    return Result("training", "a case", "ours", "theirs", ratio, ratio, ratio, (ratio, 1.0), "s", bound)


def test_every_round_runs_each_side_once_and_every_other_one_backwards():
    order = []
    times = alternate({name: lambda name=name: order.append(name) for name in "abc"}, repeats=2, warmup=1)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    """So a machine that is slow for one round, on both sides, changes nothing."""
    measured = {"ours": [2.0, 200.0, 6.0], "theirs": [1.0, 100.0, 2.0]}
    compared = compare("training", "a case", measured, "ours", "theirs")
    assert (compared.ratio, compared.low, compared.high) == (2.0, 2.0, 2.5)
    assert compared.values == (6.0, 2.0)


def test_quartiles_of_a_single_value():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("ratio", "bound", "holds"),
    [
        (1.0, None, None),
        (1.02, "<= 1.02", True),
        (1.03, "<= 1.02", False),
        (1.2, ">= 1.15", True),
        (1, ">= 1.15", False),
    ],
)
def test_result_holds_within_its_bound(ratio, bound, holds):
    assert result(ratio, bound).holds is holds


def test_garbage_collection_is_as_it_was_after_an_error():
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda: 1 / 0}, repeats=1)
    assert harness.gc.isenabled()


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)
    # `x` for the weight's gradient, the product for its square: saved by both of the multiplication's operands
    assert saved_bytes(lambda: (y := model(x)).mul(y).sum(), model) == 2 * x.nbytes


def test_saved_bytes_leaves_out_what_checkpointing_drops():
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(4, 8, requires_grad=True)
    checkpointed = saved_bytes(lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum(), model)
    assert checkpointed == x.nbytes
    assert saved_bytes(lambda: model(x).sum(), model) == x.nbytes + 4 * 64 * 4


def test_copies_share_their_weights_and_nothing_else():
    base = models.build(models.tiny())
    copied = models.share(base)
    assert all(a is b for a, b in zip(base.parameters(), copied.parameters(), strict=True))
    assert not set(map(id, base.modules())) & set(map(id, copied.modules()))


def test_report_names_ratio_spread_and_bound():
    assert report.line(result(1.5, "<= 1.02")).endswith(
        "ours / theirs = 1.500 (1.500 to 1.500)  <= 1.02: DOES NOT HOLD"
    )
    assert "| a case | ours / theirs | 1.500 | 1.500 to 1.500 | 1500.0 / 1000.0 ms |" in report.table([result(1.5)])


# The one with all of our operators. The others take more than a minute together.
QUICK = ("gpu",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BENCHMARKS]
)
def test_quick_run_writes_ratios_machine_versions_and_command(name, tmp_path, capsys):
    arguments = ["--only", name, "--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "benchmarks_cpu.json").read_text())
    assert document["command"].startswith("python -m trl_steer.eval.benchmarks --only")
    assert document["machine"]["cores"] == os.cpu_count()
    assert document["versions"]["torch"] == torch.__version__
    assert {entry["benchmark"] for entry in document["results"]} == {name}
    assert all(entry["ratio"] > 0 and entry["low"] <= entry["high"] for entry in document["results"])
    markdown = (tmp_path / "benchmarks_cpu.md").read_text()
    assert all(entry["case"] in markdown for entry in document["results"])
    assert "benchmarks_cpu.md" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--repeats", "3"], ["--only", "nothing"], ["--device", "tpu"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "usage" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "needs a GPU" in capsys.readouterr().err
