"""`trl-steer report` on a study that was made by hand: every number of every table is computed again from answers."""

import csv
import io
import itertools
import math
import re
import shutil
import statistics
import subprocess
import sys

import hand_made_studies as studies
import numpy as np
import pytest
import scipy.stats
from hand_made_studies import failure, table
from statsmodels.stats.multitest import multipletests

from trl_steer import cli
from trl_steer.eval.report import document
from trl_steer.files import read_json, write_json

MODELS, TASKS = ("Small", "Big"), {"boolq": 3, "aqua": 2}
TITLES = {"boolq": "BoolQ", "aqua": "AQuA"}
ROWS = [row["name"] for row in studies.SMALL["rows"]]
SHARES = dict(zip(ROWS, ("100%", "2%", "2%", "0.1%", "0.8%", "0.8%", "0.05%"), strict=True))
RATES = {
    ("Small", "LoRA r=8, all"): ("1e-3", "1e-3"),
    ("Small", "r=8"): ("2e-3", "1e-3↓"),
    ("Small", "vector"): ("1e-2↓", "1e-2↓"),  # of equal scores, the lower rate
    ("Big", "LoRA r=8, all"): ("1e-2↑", "1e-3"),
    ("Big", "r=8"): ("1e-3↓", "2e-3"),
    ("Big", "vector"): ("3e-2↑", "-"),  # not all rates have a score
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return studies.small(tmp_path_factory.mktemp("study") / "small")


@pytest.fixture(scope="module")
def written(study):
    assert cli.main(["report", str(study), "--paper"]) == 0
    return {file.name: file.read_bytes() for file in (study / "report").iterdir()}


@pytest.fixture(scope="module")
def text(written):
    return written["report.md"].decode()


def answers(model, row, task):
    """For each seed a list of zeros and ones, `None` if training diverged. Seeds without a result are left out."""
    words = studies.parse(studies.TEST).get((model, row, task), [])
    found = {seed: word for seed, word in enumerate(words) if word not in ("failed", "-")}
    return {seed: None if word == "diverged" else [int(c) for c in word] for seed, word in found.items()}


def accuracies(model, row, task):
    return [sum(word) / len(word) if word else 0.0 for word in answers(model, row, task).values()]


def is_complete(model, row):
    return all(len(accuracies(model, row, task)) == seeds for task, seeds in TASKS.items())


def one_digit(value, signed=False):
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return "0.0" if signed and float(text) == 0 else text


def test_accuracies_differences_and_averages(text):
    header, rows = table(text, "Accuracy in percent, mean over seeds, and its difference to SFT in points.")
    assert header == ["Model", "Method", "Trainable", "BoolQ", "Δ", "AQuA", "Δ", "Avg.", "Δ"]
    assert [tuple(row[:3]) for row in rows] == [(m, r, SHARES[r]) for m, r in itertools.product(MODELS, ROWS)]
    for model, row, _, *cells in rows:
        expected = []
        for task, seeds in TASKS.items():
            ours, sft = accuracies(model, row, task), accuracies(model, "SFT", task)
            if not ours:
                expected += ["-", "-"]
                continue
            majority = {"boolq": 0.6, "aqua": 0.2}[task]
            collapsed = any(word and sum(word) / 10 <= majority for word in answers(model, row, task).values())
            diverged = None in answers(model, row, task).values()
            count = "" if len(ours) == seeds else f" ({len(ours)}/{seeds})"
            expected.append(one_digit(np.mean(ours)) + "†" * collapsed + "‡" * diverged + count)
            complete = len(ours) == seeds
            expected.append(one_digit(np.mean(ours) - np.mean(sft), signed=True) if complete else "-")
        if is_complete(model, row):
            ours, sft = (np.mean([np.mean(accuracies(model, r, task)) for task in TASKS]) for r in (row, "SFT"))
            expected += [one_digit(ours), one_digit(ours - sft, signed=True)]
        else:
            expected += ["-", "-"]
        assert cells == expected, (model, row)


def test_some_numbers_are_those_computed_on_paper(text):
    _, rows = table(text, "Accuracy in percent, mean over seeds, and its difference to SFT in points.")
    lines = {(model, row): cells for model, row, _, *cells in rows}
    # Small, SFT: (8 + 7 + 9) / 3, (5 + 5) / 2; Small, r=8: (7 + 0 + 8) / 3, (6 + 6) / 2, of which (5 + 6) / 2.
    assert lines["Small", "SFT"] == ["80.0", "0.0", "50.0", "0.0", "65.0", "0.0"]
    assert lines["Small", "r=8"] == ["50.0‡", "-30.0", "60.0", "+10.0", "55.0", "-10.0"]
    # 6, 7 and 5 of 10, where the most frequent answer gives 6; one of two seeds failed.
    assert lines["Small", "r=1"] == ["60.0†", "-20.0", "40.0 (1/2)", "-", "-", "-"]
    assert lines["Big", "vector"] == ["86.7", "-13.3", "-", "-", "-", "-"]


def test_standard_deviations(text):
    header, rows = table(text, "Standard deviation of the accuracy over seeds, in points.")
    assert header == ["Model", "Method", "BoolQ", "AQuA", "Avg."]
    assert len(rows) == len(MODELS) * len(ROWS)
    for model, row, *cells in rows:
        of_tasks = [accuracies(model, row, task) for task in TASKS]
        expected = [one_digit(statistics.stdev(found)) if len(found) > 1 else "-" for found in of_tasks]
        if is_complete(model, row):  # over the two seeds that both tasks have
            expected.append(one_digit(np.std([np.mean(pair) for pair in zip(*of_tasks, strict=False)], ddof=1)))
        else:
            expected.append("-")
        assert cells == expected, (model, row)
    # 0.8, 0.7, 0.9; 0.5, 0.5; 0.65, 0.6, of which the standard deviation is 0.05 / sqrt(2)
    assert rows[0] == ["Small", "SFT", "10.0", "0.0", "3.5"]


def test_learning_rates_and_the_edges_of_their_grids(text):
    header, rows = table(text, "Learning rates of the test stage.")
    assert header == ["Model", "Method", "BoolQ", "AQuA"]
    single = {"SFT": "1e-5", "LoRA r=8": "3e-4", "r=1": "2e-3", "r=8 silu": "2e-3"}
    expected = [
        [model, row, *RATES.get((model, row), [single.get(row)] * 2)] for model, row in itertools.product(MODELS, ROWS)
    ]
    assert rows == expected


def differences(model, row, reference, task):
    """By seed, of the seeds that both have and in which not both diverged: the difference of each example."""
    ours, theirs = answers(model, row, task), answers(model, reference, task)
    found = {}
    for seed in sorted(ours.keys() & theirs.keys()):
        if ours[seed] or theirs[seed]:
            sides = [side or [0] * 10 for side in (ours[seed], theirs[seed])]
            found[seed] = [a - b for a, b in zip(*sides, strict=True)]
    return found


def p_value(sums):
    """The share of all combinations of signs that give a sum at least as far from 0."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(sums))))
    return float(np.mean(np.abs(signs @ np.array(sums)) >= abs(sum(sums))))


def interval(low, high):
    return "-" if math.isnan(low) or math.isinf(low) else f"{one_digit(low, True)} to {one_digit(high, True)}"


REFERENCES, OTHERS = ["SFT", "LoRA r=8", "LoRA r=8, all"], ["vector", "r=8"]


@pytest.fixture(scope="module")
def of_others(study, tmp_path_factory):
    """A report with other references."""
    output = tmp_path_factory.mktemp("others") / "report"
    assert cli.main(["report", str(study), "--output", str(output), "--reference", *OTHERS]) == 0
    return (output / "report.md").read_text(encoding="utf-8")


def test_references_are_full_fine_tuning_and_lora_or_those_that_are_given(text, of_others):
    for report, references in ((text, REFERENCES), (of_others, OTHERS)):
        assert re.findall(r"^Differences to (.*) on the same examples", report, re.MULTILINE) == references


def test_a_reference_that_is_no_row_is_a_line_with_the_rows(study, tmp_path, capsys):
    assert cli.main(["report", str(study), "--output", str(tmp_path / "report"), "--reference", "ours"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"There is no row 'ours' in this study. Its rows are: {', '.join(ROWS)}.")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("reference", [*REFERENCES, *OTHERS])
def test_paired_tests(text, of_others, reference):
    report = of_others if reference in OTHERS else text
    header, rows = table(report, f"Differences to {reference} on the same examples, in points.")
    assert header[3:] == ["Seeds", "Difference", "95%, examples", "95%, seeds", "p", "p, Holm"]
    names = [
        (model, task, row)
        for model, task, row in itertools.product(MODELS, TASKS, ROWS)
        if row != reference and differences(model, row, reference, task)
    ]
    assert [tuple(row[:3]) for row in rows] == [(model, TITLES[task], row) for model, task, row in names]
    found = [differences(model, row, reference, task) for model, task, row in names]
    p_values = [p_value([sum(of_example) for of_example in zip(*by_seed.values(), strict=True)]) for by_seed in found]
    corrected = multipletests(p_values, method="holm")[1]
    for cells, by_seed, p, adjusted in zip(rows, found, p_values, corrected, strict=True):
        of_seeds = np.array([np.mean(of_seed) for of_seed in by_seed.values()])
        of_examples = np.mean(list(by_seed.values()), axis=0)
        over_examples = (0.0, 0.0)
        if of_examples.any():
            over_examples = scipy.stats.bootstrap(
                (of_examples,), np.mean, n_resamples=10_000, method="percentile", rng=0
            ).confidence_interval
        over_seeds = (math.nan, math.nan)
        if len(of_seeds) > 1:
            half = scipy.stats.t.ppf(0.975, len(of_seeds) - 1) * of_seeds.std(ddof=1) / math.sqrt(len(of_seeds))
            over_seeds = (of_seeds.mean() - half, of_seeds.mean() + half)
        beyond_noise = adjusted < 0.05 and (over_seeds[0] > 0 or over_seeds[1] < 0)
        difference = one_digit(of_seeds.mean(), signed=True)
        assert cells[3:] == [
            str(len(by_seed)),
            f"**{difference}**" if beyond_noise else difference,
            interval(*over_examples),
            interval(*over_seeds),
            f"{p:.2g}",
            f"{adjusted:.2g}",
        ], cells


def test_only_differences_beyond_noise_are_bold(text):
    _, rows = table(text, "Differences to SFT on the same examples, in points.")
    # All ten answers of all three seeds differ: 2 / 2**10, and 23 comparisons.
    assert [row for row in rows if "**" in row[4]] == [
        ["Big", "BoolQ", "LoRA r=8", "3", "**-100.0**", "-100.0 to -100.0", "-100.0 to -100.0", "0.002", "0.045"]
    ]
    assert len(rows) == 23


def test_a_failed_or_unfinished_run_is_not_a_result_and_all_are_counted(text):
    assert "102 runs: 89 finished, 7 diverged, 2 failed, 4 missing." in text
    assert r"- failed: Small, aqua, r=1, rate 2e-3, seed 1 (test): The GPU \| is out of \*memory\*." in text
    assert "- diverged: Small, boolq, r=8, rate 5e-3, seed 0 (rates): Training diverged: the loss is NaN." in text
    collapsed = re.findall(r"^- collapsed: (.*)$", text, re.MULTILINE)
    assert collapsed == [
        "Small, boolq, r=1, rate 2e-3, seed 0 (test): 60.0, and 60.0 for the most frequent answer",
        "Small, boolq, r=1, rate 2e-3, seed 2 (test): 50.0, and 60.0 for the most frequent answer",
        *(
            f"Big, boolq, LoRA r=8, rate 3e-4, seed {seed} (test): 0.0, and 60.0 for the most frequent answer"
            for seed in range(3)
        ),
    ]
    assert "- the grids" in text


def test_latex_has_the_same_numbers(written, text):
    tex = written["tables.tex"].decode()
    found = re.findall(r"\\caption\{(.*)\}\n(?:.*\n){3}\\toprule\n(.*) \\\\\n([\s\S]*?)\\bottomrule", tex)
    assert tex.count(r"\begin{table}") == len(found) == len(re.findall(r"^\| --- ", text, re.MULTILINE))
    tables = re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE)
    for (_, header, body), of_markdown in zip(found, tables, strict=True):
        rows = [row.removesuffix(r" \\").split(" & ") for row in body.splitlines() if row != r"\midrule"]
        lines = [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in of_markdown.splitlines()]
        assert len(header.split(" & ")) == len(lines[0])
        numbers = [re.findall(r"\d+(?:\.\d+)?", " ".join(row)) for row in rows]
        assert numbers == [re.findall(r"\d+(?:\.\d+)?", " ".join(line)) for line in lines[2:]]


def test_the_papers_numbers_stand_beside_those_of_the_study(text):
    header, rows = table(text, "Accuracies in percent, and differences to SFT in points, beside the paper")
    assert header[2:4] == ["Small", "Big"]
    assert header[4] == "Llama-3.2-1B (paper)"
    lines = {(task, row): cells for task, row, *cells in rows}
    assert list(lines) == [(TITLES[task], row) for task in TASKS for row in ROWS if row != "r=8 silu"]
    assert lines["BoolQ", "r=8"] == [
        *("50.0 (-30.0)", "90.0 (-10.0)"),
        *("86.2 (-2.0)", "82.0 (-1.3)", "90.7 (-0.7)", "92.3 (+0.7)"),
    ]
    # Printed as -6.3, and no result of one model
    assert lines["AQuA", "vector"][:3] == ["50.0 (0.0)", "-", r"30.9 (-5.3\*)"]


def test_the_papers_tables_have_recomputed_differences(text):
    _, rows = table(text, "The paper's Table 2")
    lines = {(model, method): cells for model, method, *cells in rows}
    # LoFiT, ARC: 46.3 - 60.3, printed as -20.0, and the average with it
    assert lines["Llama-3.2-1B", "LoFiT"] == [
        *("0.003%", "83.0", "-5.2", "49.2", "-9.0", "46.3", r"-14.0\* (-20.0)", "28.2", "-4.0"),
        *("32.5", "-3.7", "64.1", "-2.1", r"-6.3\* (-7.3)"),
    ]
    assert ["LoRA, r=8", "0.26%", "10.52", "0.48"] in table(text, "The paper's Table 3")[1]
    assert ["Gemma-3-1B", "WinoG", "51.4", "51.8", r"51.4\*", "50.8", "51.3", "50.9"] in table(
        text, "The paper's Table 4"
    )[1]


def test_csv_has_every_run(written, study):
    rows = list(csv.DictReader(io.StringIO(written["runs.csv"].decode())))
    assert len(rows) == 102
    assert len(list((study / "cells").iterdir())) == sum(row["state"] == "finished" for row in rows) == 89
    tested = {
        (row["model"], row["method"], row["task"], int(row["seed"])): row for row in rows if row["stage"] == "test"
    }
    for (model, row, task), words in studies.parse(studies.TEST).items():
        for seed, word in enumerate(words):
            line = tested.pop((model, row, task, seed))
            if set(word) <= {"0", "1"}:
                assert line["state"] == "finished"
                assert float(line["accuracy"]) == word.count("1") / 10
                assert float(line["majority"]) == (0.6 if task == "boolq" else 0.2)
            else:
                assert line["state"] == {"-": "missing"}.get(word, word)
                assert line["accuracy"] == ("0.0" if word == "diverged" else "")
    assert {line["state"] for line in tested.values()} == {"missing"}  # no rate is chosen
    line = next(row for row in rows if (row["model"], row["method"], row["rate"]) == ("Big", "r=8", "0.002"))
    assert (line["trainable_parameters"], line["trainable_share"], line["steps"]) == ("8000", "0.008", "60")
    assert (line["seconds"], line["tokens_per_second"], line["peak_memory_bytes"]) == ("12.5", "80.0", "2000000")
    assert (line["settings.method"], line["settings.r"], line["settings.model"]) == ("low_rank", "8", "someone/Big")
    assert float(line["settings.training.learning_rate"]) == 2e-3
    failed = next(row for row in rows if row["state"] == "failed")
    assert (failed["reason"], failed["attempts"]) == ("The GPU | is out of *memory*.", "3")


def test_csv_has_what_depends_on_the_machine_in_its_last_columns(written):
    header = written["runs.csv"].decode().splitlines()[0].split(",")
    assert header[-4:] == ["attempts", "seconds", "tokens_per_second", "peak_memory_bytes"]


def test_equal_studies_have_equal_reports_but_for_times(study, written, tmp_path):
    other = tmp_path / "elsewhere" / "copy"
    shutil.copytree(study, other, ignore=shutil.ignore_patterns("report"))
    for file in other.glob("cells/*/training.json"):
        write_json(file, {**read_json(file), "seconds": 99.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1})
    for file in other.glob("failed/*.json"):
        write_json(file, {**read_json(file), "attempts": 2})
    command = [
        sys.executable,
        "-m",
        "trl_steer.cli",
        "report",
        str(other),
        "--paper",
        "--output",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    again = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert again.keys() == written.keys()
    assert [name for name in again if again[name] != written[name]] == ["runs.csv"]
    before, after = (
        [row[:-4] for row in csv.reader(io.StringIO(files["runs.csv"].decode()))] for files in (written, again)
    )
    assert before == after


def test_a_report_is_only_replaced_if_asked_and_other_files_never_are(study, written, capsys, tmp_path):
    output = tmp_path / "report"
    assert cli.main(["report", str(study), "--output", str(output)]) == 0
    (line,) = failure(capsys, study, "--output", output)
    assert line.endswith("Use --overwrite to replace it, or choose another folder.")
    assert cli.main(["report", str(study), "--output", str(output), "--overwrite", "--paper"]) == 0
    assert {file.name: file.read_bytes() for file in output.iterdir()} == written
    (output / "notes.md").write_text("mine")
    (line,) = failure(capsys, study, "--output", output, "--overwrite")
    assert "is not only a report" in line
    assert (output / "notes.md").read_text() == "mine"
    (line,) = failure(capsys, study, "--output", output / "notes.md", "--overwrite")
    assert "is not only a report" in line
    (line,) = failure(capsys, study, "--output", study, "--overwrite")
    assert "is not only a report" in line
    assert (study / "study.yaml").is_file()


def test_a_report_behind_a_link_is_replaced_where_it_is(study, written, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for more in ((), ("--overwrite",)):
        assert cli.main(["report", str(study), "--paper", "--output", str(tmp_path / "link"), *more]) == 0
        assert {file.name: file.read_bytes() for file in (tmp_path / "real").iterdir()} == written
        assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]


def test_a_report_never_replaces_the_folder_of_the_shell(study, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", ".."):
        (line,) = failure(capsys, study, "--output", output)
        assert line.endswith("in which the command runs. Choose another folder.")
    assert [*(tmp_path / "here").iterdir()] == []


def test_every_picture_of_the_report_is_shown(written, text):
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(shown) == sorted(name for name in written if name.endswith(".png"))
    assert shown == [
        "parameters.png",
        *("rank_low_rank_boolq.png", "rank_low_rank_aqua.png"),
        *("rates_boolq.png", "rates_aqua.png"),
    ]
    assert all(document.is_ours(name) for name in written)
