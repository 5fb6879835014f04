"""`trl-steer report` on studies that are unfinished, small, damaged or otherwise special."""

import csv
import io
import json

import hand_made_studies as studies
import pytest
from hand_made_studies import failure, table

from trl_steer import cli
from trl_steer.files import read_json, write_json


def test_report_does_not_name_the_folder_of_the_study(tmp_path):
    """Nor does it if a model is in it, as with --tiny."""
    model = {"name": str(tmp_path.resolve() / "study" / "tiny-model"), "label": "tiny"}

    def outcome(cell):
        folder = (tmp_path / "study").resolve()
        return studies.results.Failure(
            f"Out of memory (the traceback is in {folder}/running/{cell.key}/log)", 3, False
        )

    folder = studies.write(tmp_path / "study", {**studies.SMALL, "models": [model]}, outcome, studies.TARGETS)
    assert cli.main(["report", str(folder)]) == 0
    assert ",tiny-model," in (folder / "report" / "runs.csv").read_text()
    for name in ("report.md", "runs.csv"):
        found = (folder / "report" / name).read_text()
        assert "the traceback is in running/" in found
        assert str(tmp_path) not in found


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    first, *others = studies.SMALL["rows"]
    contents = {**studies.SMALL, "rows": [{**first, "name": "a$x$b"}, {**others[3], "name": "$_$"}, *others[:3]]}
    folder = studies.write(
        tmp_path / "study", contents, lambda cell: studies.TARGETS[cell.task], studies.TARGETS, studies.small_training
    )
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report" / "parameters.png").is_file()


def test_report_of_a_study_that_has_just_begun(tmp_path, capsys):
    folder = studies.write(tmp_path / "study", studies.SMALL, lambda cell: None, studies.TARGETS)
    assert cli.main(["report", str(folder), "--paper"]) == 0
    assert sorted(file.name for file in (folder / "report").iterdir()) == ["report.md", "runs.csv", "tables.tex"]
    _, rows = table((folder / "report" / "report.md").read_text(), "Accuracy in percent")
    assert all(set(row[2:]) == {"-"} for row in rows)
    assert len(rows) == len(studies.SMALL["models"]) * len(studies.SMALL["rows"])


def test_report_without_full_fine_tuning_has_no_differences_to_it(tmp_path):
    contents = {**studies.SMALL, "rows": studies.SMALL["rows"][1:]}
    folder = studies.write(tmp_path / "study", contents, studies.small_outcome, studies.TARGETS)
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report" / "report.md").read_text()
    header, _ = table(text, "Accuracy in percent, mean over seeds.")
    assert header == ["Model", "Method", "Trainable", "BoolQ", "AQuA", "Avg."]
    assert "Differences to LoRA r=8 on" in text
    assert "Differences to SFT" not in text
    assert "The paper" not in text


def test_report_without_full_fine_tuning_and_lora_compares_with_the_first_row(tmp_path):
    contents = {**studies.SMALL, "rows": studies.SMALL["rows"][3:]}
    folder = studies.write(tmp_path / "study", contents, studies.small_outcome, studies.TARGETS)
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report" / "report.md").read_text()
    _, rows = table(text, "Differences to r=1 on the same examples, in points.")
    assert {row[2] for row in rows} == {"r=8", "r=8 silu", "vector"}
    assert text.count("Differences to ") == 1


def test_a_single_task_has_no_average(tmp_path):
    contents = {**studies.SMALL, "tasks": ["boolq"]}
    folder = studies.write(
        tmp_path / "study", contents, studies.small_outcome, studies.TARGETS, studies.small_training
    )
    assert cli.main(["report", str(folder)]) == 0
    text = (folder / "report" / "report.md").read_text()
    header, rows = table(text, "Accuracy in percent")
    assert header == ["Model", "Method", "Trainable", "BoolQ", "Δ"]
    assert rows[1] == ["Small", "LoRA r=8", "2%", "73.3", "-6.7"]
    header, rows = table(text, "Standard deviation")
    assert (header, rows[0]) == (["Model", "Method", "BoolQ"], ["Small", "SFT", "10.0"])


def test_report_of_a_study_without_an_evaluated_task(tmp_path):
    contents = {**studies.SMALL, "tasks": ["alpaca"], "rows": [{"name": "SFT", "method": "full", "rates": [1e-5]}]}
    folder = studies.write(tmp_path / "study", contents, lambda cell: None, studies.TARGETS)
    assert cli.main(["report", str(folder)]) == 0
    assert "No task of this study is evaluated." in (folder / "report" / "report.md").read_text()
    assert (folder / "report" / "runs.csv").read_text().count("\n") == 1 + 2 * 3


def test_seeds_with_other_examples_count_each_example_once(tmp_path):
    """As with generated data: the units of the test are all examples of all seeds."""
    contents = {
        "name": "two",
        "title": "Two rows",
        "models": ["someone/model"],
        "tasks": ["boolq"],
        "rows": studies.SMALL["rows"][:2],
        "seeds": [0, 1],
    }
    ours, theirs = ["1111111111", "1111111100"], ["1110000000", "0001111100"]
    folder = studies.write(
        tmp_path / "study",
        contents,
        lambda cell: (ours if cell.row == "SFT" else theirs)[cell.seed],
        studies.TARGETS,
    )
    for file in folder.glob("cells/*/scores/*.json"):
        scores, settings = read_json(file), read_json(file.parents[1] / "settings.json")
        examples = [{**row, "id": f"{settings['seed']}-{row['id']}"} for row in scores["examples"]]
        write_json(file, {**scores, "examples": examples})
    assert cli.main(["report", str(folder)]) == 0
    _, rows = table((folder / "report" / "report.md").read_text(), "Differences to SFT")
    # LoRA loses 7 of 10 and 3 of 10: ten examples in which only SFT is right. The same examples would be seven units.
    assert rows[0][4] == "-50.0"
    assert rows[0][7] == f"{2 / 2**10:.2g}"


def test_runs_on_different_examples_are_not_compared(tmp_path, capsys):
    folder = studies.small(tmp_path / "study")
    file = next(
        file
        for file in folder.glob("cells/*/scores/steer_boolq.json")
        if read_json(file.parents[1] / "settings.json")["method"] == "full"
    )
    scores = read_json(file)
    scores["examples"][0]["id"] = "another"
    write_json(file, scores)
    (line,) = failure(capsys, folder)
    assert "a paired test needs the same examples" in line
    assert "on 10 and 10, 9 in common" in line


@pytest.mark.parametrize("task", ["steer_aqua", "steer_aqua_val"])
@pytest.mark.parametrize("damage", ["{", '{"examples": []}', '{"examples": [{"id": "1"}]}', "[]", None])
def test_a_damaged_run_is_named(tmp_path, capsys, task, damage):
    folder = studies.small(tmp_path / "study")
    file = sorted(folder.glob(f"cells/*/scores/{task}.json"))[0]
    file.unlink() if damage is None else file.write_text(damage)
    (line,) = failure(capsys, folder)
    assert line.startswith("trl-steer report: error: ")
    assert str(file.parents[1]) in line
    assert not (folder / "report").exists()


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_a_damaged_record_of_a_failure_is_one_line(tmp_path, capsys, damage):
    folder = studies.small(tmp_path / "study")
    file = sorted(folder.glob("failed/*.json"))[0]
    file.write_text(damage)
    (line,) = failure(capsys, folder)
    assert line.startswith(f"trl-steer report: error: {file} is damaged: ")
    assert line.endswith(". Remove it and run the study again.")


def test_a_folder_without_a_study_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        (line,) = failure(capsys, folder)
        expected = f"{folder} has no study.yaml. Give the output folder of `trl-steer reproduce`."
        assert line == f"trl-steer report: error: {expected}"
    (tmp_path / "study.yaml").write_text("rows: [")
    (line,) = failure(capsys, tmp_path)
    assert "invalid YAML" in line


def test_settings_that_are_lists_are_json_in_the_csv(tmp_path):
    row = {"name": "LoRA", "method": "lora", "lora": {"target_modules": ["q_proj", "v_proj"]}}
    folder = studies.write(
        tmp_path / "study", {**studies.SMALL, "rows": [row]}, lambda cell: "1" * 10, studies.TARGETS
    )
    assert cli.main(["report", str(folder)]) == 0
    (line, *_) = csv.DictReader(io.StringIO((folder / "report" / "runs.csv").read_text()))
    assert json.loads(line["settings.lora.target_modules"]) == ["q_proj", "v_proj"]
