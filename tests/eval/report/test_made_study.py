"""Reports of studies whose runs were really made."""

import csv
import io
import shutil

import pytest

from trl_steer import cli
from trl_steer.eval.report import runs_csv
from trl_steer.eval.reproduce.results import CELLS


@pytest.mark.slow
def test_a_study_that_was_interrupted_has_the_report_of_one_that_was_not(tmp_path):
    pytest.importorskip("lm_eval")
    reports = []
    for name in ("undisturbed", "elsewhere/interrupted"):
        folder = tmp_path / name
        rows = ["SFT", "LoRA r=8 (paper)", "Ours r=8"]
        command = ["reproduce", "table1", "--tiny", "--default-rates", "--output", str(folder), "--rows", *rows]
        assert cli.main(command) == 0
        if "interrupted" in name:
            for cell in sorted((folder / CELLS).iterdir())[::2]:
                shutil.rmtree(cell)
            assert cli.main(["report", str(folder), "--output", str(tmp_path / "unfinished")]) == 0
            assert "3 missing" in (tmp_path / "unfinished" / "report.md").read_text()
            assert cli.main(command) == 0
        assert cli.main(["report", str(folder), "--paper"]) == 0
        reports.append({file.name: file.read_bytes() for file in (folder / "report").iterdir()})
    first, second = reports
    assert first.keys() == second.keys() >= {"report.md", "tables.tex", "runs.csv", "parameters.png"}
    assert {name for name in first if first[name] != second[name]} <= {"runs.csv"}
    rows = [list(csv.DictReader(io.StringIO(files["runs.csv"].decode()))) for files in reports]
    for before, after in zip(*rows, strict=True):
        assert before["state"] == "finished"
        assert all(float(before[name]) > 0 for name in runs_csv.MACHINE if name != "attempts")
        assert {**before, **dict.fromkeys(runs_csv.MACHINE)} == {**after, **dict.fromkeys(runs_csv.MACHINE)}
