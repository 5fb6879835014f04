"""Judging: the package's numbers on correctly indexed rows, whatever the file of outputs looks like."""

import json
import random
from pathlib import Path

import alpaca_judging
import alpaca_rows
import pytest
import yaml
from loopback_judge import LoopbackJudge

from trl_steer.eval.alpaca_eval import cli, upstream
from trl_steer.eval.alpaca_eval.reference import Reference, read_outputs

METRICS = ("win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error", "discrete_win_rate")


def by_the_package(records, gamed: Path, weights: Path) -> dict:
    """The package called by hand, on annotations of which each carries its canonical row as its index."""
    import pandas

    glm = upstream.load().metrics.glm_winrate
    theirs = glm.hf_hub_download
    glm.hf_hub_download = lambda **_: str(gamed)
    try:
        table = pandas.DataFrame(records).set_index("row").rename_axis(None)
        return glm.get_length_controlled_winrate(table, save_weights_dir=weights)
    finally:
        glm.hf_hub_download = theirs


def annotated_by_the_package(outputs: Path, reference_folder: Path, url: str, tmp_path: Path) -> list[dict]:
    """The package's own loop, cache and requests; with the canonical row carried along."""
    import pandas

    module = upstream.load()
    client = tmp_path / "client.yaml"
    client.write_text(yaml.safe_dump({"default": [{"api_key": "none", "base_url": url}]}))
    annotator = module.annotators.PairwiseAnnotator(annotators_config=alpaca_judging.JUDGE, caching_path=None)
    baseline = json.loads((reference_folder / "alpaca_eval_gpt4_baseline.json").read_text())
    places = {row["instruction"]: index for index, row in enumerate(baseline)}
    rows = pandas.DataFrame(json.loads(outputs.read_text()))
    rows["row"] = [places[instruction] for instruction in rows["instruction"]]
    return annotator.annotate_head2head(
        pandas.DataFrame(baseline), rows, client_config_path=str(client), num_procs=4, chunksize=8
    )


def test_judgements_and_metrics_are_those_of_the_package(outputs, reference_folder, judge, tmp_path):
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    found = alpaca_judging.result(outputs.parent)
    assert judge.requests == found["n_total"] == 24
    theirs = annotated_by_the_package(outputs, reference_folder, judge.url, tmp_path)
    preferences = {row["row"]: row["preference"] for row in theirs}
    ours = {row["row"]: row["preference"] for row in alpaca_judging.annotations(outputs.parent)}
    assert ours == pytest.approx(preferences, abs=1e-12)
    numbers = by_the_package(theirs, reference_folder / "df_gamed.csv", tmp_path / "weights")
    assert {name: found[name] for name in METRICS} == pytest.approx(
        {name: numbers[name] for name in METRICS}, abs=1e-6
    )
    weights = sorted(path.relative_to(tmp_path / "weights") for path in (tmp_path / "weights").rglob("*.csv"))
    assert [(outputs.parent / "judged" / "weights" / path).is_file() for path in weights] == [True]


def test_a_permuted_file_gives_the_same_numbers_and_asks_nothing(outputs, reference_folder, judge, tmp_path):
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    first = alpaca_judging.result(outputs.parent)
    rows = json.loads(outputs.read_text())
    random.Random(1).shuffle(rows)
    permuted = alpaca_rows.write_outputs(tmp_path / "permuted" / "model_outputs.json", rows)
    shared = ("--cache", str(outputs.parent / "cache"))
    assert alpaca_judging.judge(permuted, reference_folder, judge.url, *shared) == 0
    assert judge.requests == 24
    second = alpaca_judging.result(permuted.parent)
    assert alpaca_judging.numbers(second) == alpaca_judging.numbers(first)
    # Judged anew, the order of the requests is another, and the numbers are not.
    assert alpaca_judging.judge(permuted, reference_folder, judge.url) == 0
    assert judge.requests == 48
    assert alpaca_judging.numbers(alpaca_judging.result(permuted.parent)) == alpaca_judging.numbers(first)


def test_a_subset_of_100_rows_takes_the_right_difficulties(tmp_path, judge):
    reference_folder = alpaca_rows.write_reference(tmp_path / "reference", 160)
    rows = random.Random(2).sample(range(160), 100)
    outputs = alpaca_rows.write_outputs(
        tmp_path / "subset" / "model_outputs.json", alpaca_rows.outputs_for(reference_folder, rows)
    )
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    records = alpaca_judging.annotations(outputs.parent)
    assert [record["row"] for record in records] == sorted(rows)
    gamed, found = reference_folder / "df_gamed.csv", alpaca_judging.result(outputs.parent)
    right = by_the_package(records, gamed, tmp_path / "weights")["length_controlled_winrate"]
    assert found["length_controlled_winrate"] == pytest.approx(right, abs=1e-6)
    # What the package gives for the same annotations when it counts rows by their position.
    positions = [{**record, "row": position} for position, record in enumerate(records)]
    wrong = by_the_package(positions, gamed, tmp_path / "weights")["length_controlled_winrate"]
    assert abs(wrong - right) > 0.01


def test_rows_with_the_same_instruction_are_identified_by_their_dataset(tmp_path):
    reference = [
        {"instruction": "Sing.", "output": "", "generator": "g", "dataset": name} for name in ("koala", "helpful")
    ]
    given = [{**row, "output": row["dataset"], "generator": "m"} for row in reversed(reference)]
    path = alpaca_rows.write_outputs(tmp_path / "model_outputs.json", given)
    known = Reference(reference, None, {}, verified=False)
    assert read_outputs(path, known).by_row == {0: "koala", 1: "helpful"}


def test_a_model_with_the_name_of_the_baseline_is_not_comparable(outputs, reference_folder, judge):
    renamed = [{**row, "generator": "written_baseline"} for row in json.loads(outputs.read_text())]
    alpaca_rows.write_outputs(outputs, renamed)
    alpaca_judging.judge(outputs, reference_folder, judge.url)
    assert "the name of the baseline" in "; ".join(alpaca_judging.result(outputs.parent)["not_comparable_because"])


def test_an_interrupted_subset_is_part_of_the_whole(outputs, reference_folder, judge):
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, "--limit", "7") == 0
    assert alpaca_judging.result(outputs.parent)["n_total"] == judge.requests == 7
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 0
    assert set(judge.asked.values()) == {1}


def test_first_request_is_sent_alone_and_its_answer_counts(outputs, reference_folder):
    with LoopbackJudge(lambda number, instruction: "no_logprobs") as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url) == 1
        assert len(server.asked) == 1


def test_requests_in_flight_are_bounded(outputs, reference_folder):
    with LoopbackJudge(delay=0.02) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--in-flight", "3") == 0
        assert 1 < server.most_at_once <= 3


def test_without_yes_the_cost_is_shown_and_no_request_is_sent(outputs, reference_folder, judge, capsys):
    arguments = alpaca_judging.arguments(outputs, reference_folder, judge.url)
    arguments.remove("--yes")
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert "24 requests to gpt-4-1106-preview" in shown.out
    assert "dollars" in shown.out
    assert "--yes" in shown.err
    assert judge.requests == 0


def test_reference_files_are_needed_before_the_first_call(outputs, reference_folder, judge, tmp_path, capsys):
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "alpaca_eval_gpt4_baseline.json").write_bytes(
        (reference_folder / "alpaca_eval_gpt4_baseline.json").read_bytes()
    )
    assert alpaca_judging.judge(outputs, folder, judge.url) == 2
    assert "Can't find df_gamed.csv" in capsys.readouterr().err
    assert judge.requests == 0


def test_a_judge_of_ones_own_is_one_yaml_file_with_its_own_answers(outputs, reference_folder, judge, tmp_path):
    alpaca_judging.judge(outputs, reference_folder, judge.url)
    from trl_steer.eval import alpaca_eval

    example = yaml.safe_load(Path(alpaca_eval.__path__[0], "local_judge.yaml").read_text())
    (name,) = example
    example[name]["completions_kwargs"]["client_kwargs"]["base_url"] = judge.url
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(example))
    command = alpaca_judging.arguments(outputs, reference_folder, judge.url, "--judge", str(config))
    del command[command.index("--endpoint") : command.index("--endpoint") + 2]
    assert cli.main(command) == 0
    assert set(judge.asked.values()) == {2}
    found = alpaca_judging.result(outputs.parent)
    assert found["judge"]["name"] == name
    assert any(f"the judge is {name}" in reason for reason in found["not_comparable_because"])


def test_another_model_of_the_same_judge_is_asked_anew_and_not_comparable(outputs, reference_folder, judge):
    alpaca_judging.judge(outputs, reference_folder, judge.url)
    alpaca_judging.judge(outputs, reference_folder, judge.url, "--judge-model", "Llama-3-Instruct")
    assert set(judge.asked.values()) == {2}
    assert {body["model"] for body in judge.bodies} == {"gpt-4-1106-preview", "Llama-3-Instruct"}
    found = alpaca_judging.result(outputs.parent)
    assert any("Llama-3-Instruct" in reason for reason in found["not_comparable_because"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--judge", "nobody"], "There is no judge 'nobody'"),
        (["--endpoint", "localhost:8000"], "must be a URL like"),
        (["--endpoint", "http://me:secret@localhost/v1"], "without credentials"),
        (["--api-key-env", "NOWHERE_TO_BE_FOUND"], "NOWHERE_TO_BE_FOUND is empty"),
    ],
)
def test_invalid_arguments_are_one_line_before_the_first_request(outputs, reference_folder, judge, capsys, more, said):
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, *more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("trl-steer alpaca-eval judge: ")
    assert said in line
    assert "secret" not in line
    assert judge.requests == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instruction": "Something else."}, "is not in the reference set"),
        ({"generator": "another"}, "one generator"),
        ({"output": None}, "strings in instruction, output, generator"),
    ],
)
def test_outputs_that_do_not_match_the_reference_are_refused(outputs, reference_folder, judge, capsys, change, said):
    rows = json.loads(outputs.read_text())
    rows[5].update(change)
    outputs.write_text(json.dumps(rows))
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 2
    assert said in capsys.readouterr().err
    assert judge.requests == 0


def test_nan_result_is_reported_and_marked(outputs, reference_folder, judge, capsys):
    alpaca_judging.judge(outputs, reference_folder, judge.url, "--limit", "1")
    found = alpaca_judging.result(outputs.parent)
    assert found["n_total"] == 1
    assert found["lc_standard_error"] is None
    assert found["standard_error"] is None
    assert "lc_standard_error is NaN" in found["not_comparable_because"]
    shown = capsys.readouterr()
    assert "NaN" in shown.out
    assert "WARNING: NOT COMPARABLE" in shown.err


def test_a_judge_that_calls_a_function_is_read_by_its_own_parser(outputs, reference_folder, tmp_path):
    def fault(number, instruction):
        return "cut_off" if number == 4 else None

    with LoopbackJudge(fault) as server:
        more = ("--judge", "alpaca_eval_gpt4_turbo_fn")
        assert alpaca_judging.judge(outputs, reference_folder, server.url, *more) == 0
        assert server.requests == 25
    assert {record["preference"] for record in alpaca_judging.annotations(outputs.parent)} == {1.0, 2.0}
    found = alpaca_judging.result(outputs.parent)
    assert found["win_rate"] == found["discrete_win_rate"]


@pytest.mark.parametrize("said", ["None", "False", "3", "'1'", "[1, 2]", "nonsense"])
def test_answer_without_a_preference_does_not_count(outputs, reference_folder, tmp_path, said):
    (tmp_path / "prompt.txt").write_text("Which is better? {instruction} {output_1} {output_2}")
    settings = {"prompt_template": "prompt.txt", "completions_kwargs": {"model_name": "m"}}
    settings["fn_completion_parser"] = "eval_parser"
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"mine": settings}))
    answers = iter(["1", "2"])

    def answer(number, instruction):
        content = next(answers, said)
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}

    with LoopbackJudge(answer) as server:
        more = ("--judge", str(tmp_path / "judge.yaml"), "--limit", "3", "--in-flight", "1")
        assert alpaca_judging.judge(outputs, reference_folder, server.url, *more) == 1
    found = alpaca_judging.result(outputs.parent)
    assert (found["n_total"], len(found["missing_rows"])) == (2, 1)
    assert "has no judgement" in next(iter(found["failures"]))


@pytest.mark.parametrize(
    ("row", "said"), [("text", "must be an object"), ({"output": "\ud83d"}, "has an unpaired surrogate")]
)
def test_a_row_that_cannot_be_judged_is_named(outputs, reference_folder, judge, capsys, row, said):
    rows = json.loads(outputs.read_text())
    rows[5] = {**rows[5], **row} if isinstance(row, dict) else row
    outputs.write_text(json.dumps(rows))
    assert alpaca_judging.judge(outputs, reference_folder, judge.url) == 2
    shown = capsys.readouterr().err
    assert "Row 5 of" in shown
    assert said in shown
    assert judge.requests == 0


def test_a_file_that_begins_with_a_byte_order_mark_is_read(outputs, reference_folder, judge):
    outputs.write_text(outputs.read_text(), encoding="utf-8-sig")
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, "--limit", "2") == 0
