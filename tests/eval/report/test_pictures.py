"""The pictures of a report: what is drawn where, and what the axes say."""

import math

import hand_made_studies as studies
import numpy as np
import pytest

from trl_steer.eval.analysis import figures
from trl_steer.eval.report import pictures, records
from trl_steer.eval.report.summary import Summary


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return Summary(records.read(studies.small(tmp_path_factory.mktemp("study"))))


def drawn(axes):
    """By label: x, y and the length of the error bar of each point."""
    found = {}
    for bars in axes.containers:
        x, y = bars.lines[0].get_data()
        (segments,) = [lines.get_segments() for lines in bars.lines[2]]
        found[bars.get_label()] = [
            (float(a), float(b), float(segment[1][1] - segment[0][1]) / 2)
            for a, b, segment in zip(x, y, segments, strict=True)
        ]
    return found


def test_accuracy_against_parameters(summary):
    figure = pictures.against_parameters(summary)
    small, big = figure.axes
    assert (small.get_title(), big.get_title()) == ("Small", "Big")
    assert (small.get_xlabel(), small.get_xscale()) == ("trainable parameters", "log")
    assert small.get_ylabel() == "accuracy (%), average over 2 tasks"
    figure.draw_without_rendering()
    shown = [tick.get_text() for tick in small.get_xticklabels()]
    assert {"10k", "100k", "1M"} <= set(shown)
    points = drawn(small)
    assert list(points) == ["r=8", "r=8 silu", "LoRA r=8", "LoRA r=8, all", "SFT"]  # complete rows, by size
    # The average of 80.0 and 50.0; that of the two seeds is 65.0 and 60.0.
    assert points["SFT"] == [pytest.approx((1e6, 65.0, 5 / math.sqrt(2)))]
    assert points["r=8"][0][1] == pytest.approx(55.0)


def test_points_with_as_many_parameters_do_not_cover_each_other(summary):
    points = drawn(pictures.against_parameters(summary).axes[0])
    pair = [points[row][0][0] for row in ("LoRA r=8", "LoRA r=8, all")]
    assert pair[1] / pair[0] == pytest.approx(1.18)
    assert math.sqrt(pair[0] * pair[1]) == pytest.approx(20_000)


def test_every_row_has_its_own_look():
    looks = [figures._style(series) for series in range(49)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 49


def test_accuracy_against_rank_and_nonlinearity(summary):
    figure = pictures.against_rank(summary, "low_rank", "boolq")
    small, big = figure.axes
    assert (small.get_title(), big.get_title()) == ("Small", "Big")
    assert figure.get_supxlabel() == "rank of low-rank steering"
    assert figure.get_supylabel() == "BoolQ, accuracy (%)"
    assert [tick.get_text() for tick in small.get_xticklabels()] == ["1", "8"]
    points = drawn(small)
    assert list(points) == ["linear", "silu"]
    # 6, 7 and 5 of 10, and 7, 0 and 8. The lines are two percent to the left and the right.
    assert points["linear"] == [
        pytest.approx((1 / 1.04**0.5, 60.0, 10.0)),
        pytest.approx((8 / 1.04**0.5, 50.0, 100 * np.std([0.7, 0.0, 0.8], ddof=1))),
    ]
    assert points["silu"] == [pytest.approx((8 * 1.04**0.5, 80.0, 0.0), abs=1e-9)]


def by_rank(folder, method, rows):
    """The picture of the rows of a study with a model and a task, without results that matter."""
    contents = {**studies.SMALL, "models": ["someone/model"], "tasks": ["boolq"], "rows": rows}
    studies.write(folder, contents, lambda cell: "1111111000", studies.TARGETS)
    return pictures.against_rank(Summary(records.read(folder)), method, "boolq")


def test_rows_that_differ_in_more_than_rank_are_lines_of_their_own(tmp_path):
    rows = [
        {"name": f"{r} {positions}", "method": "low_rank", "r": r, "steering": {"positions": positions}}
        for r in (1, 8)
        for positions in ("all", "last_prompt")
    ]
    figure = by_rank(tmp_path, "low_rank", rows)
    assert list(drawn(figure.axes[0])) == ["positions=all", "positions=last_prompt"]


def test_sites_are_panels(tmp_path):
    sites = {"name": "{site} {r}", "method": "sublayer", "grid": {"site": ["pre_mlp", "post_mlp"], "r": [1, 8]}}
    vector = {"name": "vector", "method": "sublayer", "r": 4, "steering": {"steering_type": "vector"}}
    figure = by_rank(tmp_path, "sublayer", [sites, vector])
    assert [axes.get_title() for axes in figure.axes] == ["model, pre_mlp", "model, post_mlp"]
    for axes in figure.axes:
        (points,) = drawn(axes).values()
        assert [rank for rank, *_ in points] == [1, 8]
    assert figure.get_supxlabel() == "rank of sublayer steering"


def test_a_single_rank_has_no_picture(tmp_path):
    assert by_rank(tmp_path, "low_rank", [{"name": "one", "method": "low_rank", "r": 8}]) is None


def test_accuracy_against_rate_has_a_panel_for_each_row_with_several_rates(summary):
    figure = pictures.against_rate(summary.record, "boolq")
    assert [axes.get_title() for axes in figure.axes] == ["LoRA r=8, all", "r=8", "vector"]
    assert figure.get_supxlabel() == "learning rate"
    assert figure.get_supylabel() == "BoolQ, validation accuracy (%)"
    axes = figure.axes[1]
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1e-3", "2e-3", "5e-3"]
    # 4 and 6 of 10 with their standard errors, and one that diverged
    errors = [100 * math.sqrt(share * (1 - share) / 10) for share in (0.4, 0.6)]
    assert drawn(axes)["Small"] == [
        pytest.approx((1e-3, 40.0, errors[0])),
        pytest.approx((2e-3, 60.0, errors[1])),
        (5e-3, 0.0, 0.0),
    ]
    crosses = [line.get_data() for line in axes.lines if line.get_marker() == "x"]
    assert [(list(x), list(y)) for x, y in crosses] == [([5e-3], [0.0])] * 2
    rings = [line.get_xdata()[0] for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert rings == [2e-3, 1e-3]  # the rates of the test stage


def test_a_legend_names_every_series_once(summary):
    figure = pictures.against_rate(summary.record, "boolq")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Small", "Big"]
    (legend,) = pictures.against_parameters(summary).legends
    # In the order of the study
    assert [text.get_text() for text in legend.get_texts()] == [
        *("SFT", "LoRA r=8", "LoRA r=8, all", "r=1", "r=8", "r=8 silu"),
    ]
