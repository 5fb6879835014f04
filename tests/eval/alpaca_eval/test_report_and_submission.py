"""Results side by side, and the folder for the leaderboard."""

import json

import alpaca_judging
import alpaca_rows
import pytest
import yaml
from loopback_judge import LoopbackJudge

from trl_steer.eval.alpaca_eval import cli, judging, reference, report, upstream
from trl_steer.eval.alpaca_eval.reference import BASELINE


@pytest.fixture
def judged(outputs, reference_folder, judge):
    settings = {"model": "some/base", "adapter": "some/adapter", "prompt": "Say: {instruction}", "prompt_form": "chat"}
    settings |= {"max_new_tokens": 6, "temperature": 0.0, "parameters": {"base": 1000, "adapter": 4}}
    (outputs.parent / "generation.json").write_text(json.dumps(settings))
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    return outputs.parent / "judged"


def submit(judged, reference_folder, output, *more):
    arguments = [str(judged), "--reference", str(reference_folder), "--output", str(output)]
    return cli.main(["submit", *arguments, *more])


def test_the_table_shows_every_run_with_its_parameters_and_the_papers_rows(judged, tmp_path, capsys):
    found = alpaca_judging.result(judged.parent)
    output, plot = tmp_path / "table.md", tmp_path / "plot.png"
    arguments = [str(judged.parent), "--paper", "--output", str(output), "--plot", str(plot)]
    assert cli.main(["report", *arguments]) == 0
    table = output.read_text()
    assert table in capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("| my-model *"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "4 (0.400%)"
    names = ("length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error")
    assert cells[2:6] == [f"{found[name]:.2f}" for name in names]
    assert cells[6:] == [
        str(found["avg_length"]),
        "24",
        f"prompt chat, 6 new tokens; {alpaca_judging.JUDGE} (gpt-4-1106-preview)",
    ]
    assert "not comparable with the leaderboard" in table
    assert len([line for line in table.splitlines() if report.PAPER_SETTINGS in line]) == 7
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_papers_numbers_are_those_of_its_table():
    numbers = {(*row.numbers[:2], row.parameters) for row in report.PAPER}
    assert numbers == {
        (11.49, 0.51, "100%"),
        (11.34, 0.48, "0.05%"),
        (11.00, 0.53, "0.05%"),
        (9.59, 0.40, "0.52%"),
        (10.52, 0.48, "0.26%"),
        (10.96, 0.43, "0.05%"),
        (9.50, 0.49, "0.004%"),
    }


def test_folder_without_results_is_an_error(tmp_path, capsys):
    assert cli.main(["report"]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "There is no result.json" in capsys.readouterr().err


def test_a_file_of_another_program_is_not_reported(tmp_path, capsys):
    (tmp_path / "result.json").write_text('{"name": "mine"}')
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a result of `trl-steer alpaca-eval judge`" in capsys.readouterr().err


def test_a_submission_has_the_files_and_fields_of_the_leaderboard(judged, reference_folder, tmp_path):
    folder = tmp_path / "submission"
    assert submit(judged, reference_folder, folder, "--not-comparable") == 0
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "leaderboard_row.csv",
        "glm_weights_row.csv",
        "models_configs/my-model/configs.yaml",
        "models_configs/my-model/prompt.txt",
        "results/my-model/model_outputs.json",
        f"results/my-model/{alpaca_judging.JUDGE}/annotations.json",
    }
    rows = json.loads((folder / "results/my-model/model_outputs.json").read_text())
    assert [list(row) for row in rows] == [["dataset", "instruction", "output", "generator"]] * 24
    baseline = json.loads((reference_folder / BASELINE).read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in baseline]
    config = yaml.safe_load((folder / "models_configs/my-model/configs.yaml").read_text())["my-model"]
    assert (config["pretty_name"], config["prompt_template"]) == ("my-model", "my-model/prompt.txt")
    assert (folder / "models_configs/my-model/prompt.txt").read_text() == "Say: {instruction}"
    header, row = (folder / "leaderboard_row.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    found = alpaca_judging.result(judged.parent)
    assert (values[""], values["mode"], values["n_total"]) == ("my-model", "community", "24")
    assert float(values["length_controlled_winrate"]) == pytest.approx(found["length_controlled_winrate"], abs=1e-9)


def test_the_package_reads_a_submission_back_and_computes_the_same_numbers(judged, reference_folder, tmp_path):
    folder = tmp_path / "submission"
    assert submit(judged, reference_folder, folder, "--not-comparable") == 0
    utils, found = upstream.load().utils, alpaca_judging.result(judged.parent)
    configs = folder / "models_configs"
    config = utils.load_configs(configs / "my-model")["my-model"]
    template = utils.read_or_return(config["prompt_template"], relative_to=configs)
    outputs = utils.load_or_convert_to_dataframe(folder / "results/my-model/model_outputs.json", dtype=False)
    assert utils.make_prompts(outputs, template)[0] == [f"Say: {text}" for text in outputs["instruction"]]
    assert utils.get_generator_name(None, outputs) == "my-model"
    board, _ = utils.get_precomputed_leaderboard(folder / "leaderboard_row.csv", None, None)
    assert board.keys() == {"my-model"}
    assert list(utils.load_or_convert_to_dataframe(folder / "glm_weights_row.csv").index) == ["my-model"]
    path = folder / f"results/my-model/{alpaca_judging.JUDGE}/annotations.json"
    annotations = utils.load_or_convert_to_dataframe(path, dtype=False).set_index("row").rename_axis(None)
    again = judging.metrics(annotations, reference.load(reference_folder), tmp_path / "weights")
    for name in (*judging.NUMBERS, "discrete_win_rate", "avg_length"):
        assert again[name] == pytest.approx(found[name], abs=1e-6) == pytest.approx(board["my-model"][name], abs=1e-6)


def test_incomparable_result_is_not_submitted_by_default(judged, reference_folder, tmp_path, capsys):
    assert submit(judged, reference_folder, tmp_path / "submission") == 2
    assert "24 of 805 instructions" in capsys.readouterr().err
    assert not (tmp_path / "submission").exists()


def test_a_name_on_the_leaderboard_is_refused(reference_folder, judge, tmp_path, capsys):
    rows = alpaca_rows.outputs_for(reference_folder, name="NullModel")
    outputs = alpaca_rows.write_outputs(tmp_path / "run" / "model_outputs.json", rows)
    alpaca_judging.judge(outputs, reference_folder, judge.url)
    assert submit(outputs.parent / "judged", reference_folder, tmp_path / "submission", "--not-comparable") == 2
    assert "already on the leaderboard" in capsys.readouterr().err


def test_table_shows_nan_and_missing_rows(outputs, reference_folder, tmp_path, capsys):
    with LoopbackJudge(lambda number, instruction: "400" if instruction.endswith("number 0.") else None) as server:
        alpaca_judging.judge(outputs, reference_folder, server.url, "--limit", "2")
        capsys.readouterr()
        assert cli.main(["report", str(outputs.parent), "--plot", str(tmp_path / "plot.png")]) == 0
        shown = capsys.readouterr().out
        assert "| my-model * |  | **NaN** | **NaN** |" in shown
        assert "INCOMPLETE: 1 rows without a judgement; 1 of 805 instructions" in shown
        assert submit(outputs.parent / "judged", reference_folder, tmp_path / "submission", "--not-comparable") == 2
    assert "The result has NaN among" in capsys.readouterr().err


def test_outputs_that_changed_after_judging_are_neither_submitted_nor_reported(
    judged, outputs, reference_folder, judge, tmp_path, capsys
):
    rows = json.loads(outputs.read_text())
    rows[3]["output"] = "Something else."
    outputs.write_text(json.dumps(rows))
    assert submit(judged, reference_folder, tmp_path / "submission", "--not-comparable") == 2
    assert "have changed since they were judged" in capsys.readouterr().err
    with LoopbackJudge(lambda number, instruction: "no_logprobs") as another:
        assert alpaca_judging.judge(outputs, reference_folder, another.url) == 1
    assert cli.main(["report", str(judged)]) == 2
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    assert judge.requests == 25
    assert submit(judged, reference_folder, tmp_path / "submission", "--not-comparable") == 0


def test_a_run_that_got_another_name_can_be_submitted(judged, outputs, reference_folder, judge, tmp_path):
    outputs.write_text(json.dumps([{**row, "generator": "renamed"} for row in json.loads(outputs.read_text())]))
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    assert judge.requests == 24
    assert submit(judged, reference_folder, tmp_path / "submission", "--not-comparable") == 0
    (row,) = (tmp_path / "submission" / "glm_weights_row.csv").read_text().splitlines()[1:]
    assert row.startswith("renamed,")
