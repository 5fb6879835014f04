"""Studies: the grids of ours, as the paper has them, and what is refused."""

import re
from dataclasses import replace

import pages
import pytest
import study_cases
import yaml
from transformers import AutoConfig

from trl_steer.eval.demo import preset
from trl_steer.eval.reproduce import cli, plan
from trl_steer.eval.reproduce.study import STUDIES, STUDY, StudyError, from_dict, load, save

OURS = sorted(path.stem for path in STUDIES.glob("*.yaml"))
TABLES = ("table1", "table2", "table4", "sites")
MODELS = ("Llama-3.2-1B", "Gemma-3-1B", "Qwen3-4B", "Llama-3.1-8B")
SIZES = (1_235_814_400, 999_885_952, 4_022_468_096, 8_030_261_248)
# Trainable parameters on these models.
COUNTS = {
    "LoRA r=8 (paper)": (5_636_096, 6_522_880, 16_515_072, 20_971_520),
    "LoRA r=8 (tuned)": (5_636_096, 6_522_880, 16_515_072, 20_971_520),
    "ReFT r=8 (last_prompt)": (524_416, 479_440, 1_474_848, 2_097_408),
    "ReFT r=8 (f7+l7)": (524_416, 479_440, 1_474_848, 2_097_408),
    "Ours r=8": (524_288, 479_232, 1_474_560, 2_097_152),
    "Ours r=1": (65_536, 59_904, 184_320, 262_144),
    "Ours (1-vec)": (32_768, 29_952, 92_160, 131_072),
    "LoFiT": (32_768, 26_624, 147_456, 131_072),
    "JoLA": (66_560, 53_456, 297_216, 264_192),
}


def all_cells(study):
    first = list(study.rate_cells())
    best = {(cell.model, cell.task, cell.row): cell.rate for cell in first}
    return first + list(study.test_cells(best))


@pytest.mark.parametrize("name", OURS)
def test_a_study_is_the_same_when_it_is_saved_and_loaded(name, tmp_path):
    study = load(name)
    save(study, tmp_path)
    again = load(tmp_path / STUDY)
    cells = all_cells(study)
    assert [cell.key for cell in all_cells(again)] == [cell.key for cell in cells]
    assert len({cell.key for cell in cells}) == len(cells) == study.size()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("sites", "smollm2") else name for name in OURS]
)
def test_a_dry_run_prints_every_row_with_its_parameters(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = load(name)
    model = study.models[0].label
    assert cli.main([name, "--dry-run", "--models", model, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"cells: {replace(study, models=study.models[:1]).size()}," in said
    assert "unknown until a cell is finished" in said
    assert [row.name for row in study.rows if f"%  {row.name}: {row.method}, " not in said] == []
    assert all(guess in said for guess in study.guessed)
    assert not (tmp_path / "out").exists()


def test_an_unreachable_model_has_no_count_and_is_asked_for_once(tmp_path, monkeypatch, capsys):
    asked = []
    read = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda model: asked.append(model) or read(model))
    rows = [{**ROW, "name": name} for name in ("one", "another")]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**GOOD, "models": ["nobody/nothing"], "rows": rows}))
    assert cli.main([str(tmp_path / "study.yaml"), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"unknown            another: {ROW['method']}" in said
    assert "unknown where the configuration of the model cannot be read" in said
    assert asked == ["nobody/nothing"]


def test_a_dry_run_says_why_a_row_cannot_be_made(tmp_path, capsys):
    rows = [
        ROW,
        {"name": "deep", "method": "vector", "steering": {"layers_to_transform": [30]}},
        {"name": "elsewhere", "method": "low_rank", "steering": {"site": "post_mlp"}},
        {"name": "steered", "method": "lora", "steering": {"scaling": 2.0}},
        {"name": "misspelled", "method": "joint", "lora": {"lora_alfa": 3}},
        {"name": "no blocks", "method": "vector", "steering": {"layers_to_transform": "abc"}},
    ]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**GOOD, "models": ["embedded"], "rows": rows}))
    assert cli.main([str(tmp_path / "study.yaml"), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ *2,442,240   1.8156%  row: lora, ", said, re.MULTILINE)
    assert re.search(r"^ *refused +deep: vector, 0.01: .*\b30\b", said, re.MULTILINE)
    for row, why in (
        ("elsewhere: low_rank", "steering of the method low_rank has no 'site'."),
        ("steered: lora", "steering of the method lora has no 'scaling'."),
        ("misspelled: joint", "lora of the method joint has no 'lora_alfa'."),
        ("no blocks: vector", "layers_to_transform must contain integers only, got 'abc' in 'abc'."),
    ):
        assert re.search(rf"^ *refused +{row}, .*: {re.escape(why)}$", said, re.MULTILINE)


def test_trainable_parameters_are_those_of_the_paper():
    cells = {}
    for study in (load("table1"), load("table2")):
        assert tuple(model.label for model in study.models) == MODELS
        cells |= {(cell.model, cell.row): cell.settings for cell in all_cells(replace(study, tasks=study.tasks[:1]))}
    assert {row for _, row in cells} == COUNTS.keys() | {"SFT"}
    for row, counts in {**COUNTS, "SFT": SIZES}.items():
        found = [cells[model, row] for model in MODELS]
        assert tuple(plan.trainable(of, plan.configuration(of.model)).parameters for of in found) == counts, row


def test_a_dry_run_names_the_guesses_of_the_preset_that_the_rows_keep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["table1", "--dry-run", "--models", "Llama-3.2-1B"]) == 0
    guesses = capsys.readouterr().out.partition("Guessed:\n")[2].splitlines()[3:]
    kept = {guess.split()[1]: guess.rpartition(" (")[2] for guess in guesses}
    assert kept == {
        "warmup_steps": "paper))",  # of SFT and LoRA, and not of the tuned one
        "lora_alpha": "paper))",
        "lora_dropout": "tuned))",
        "lora_target_modules": "paper))",
        "steering_init_scale": "Ours r=8)",
    }


@pytest.mark.parametrize("name", OURS)
def test_every_study_has_the_papers_lora_and_a_tuned_one(name):
    study = load(name)
    cells = {cell.row: cell.settings for cell in all_cells(study)}
    paper, tuned = cells["LoRA r=8 (paper)"], cells["LoRA r=8 (tuned)"]
    assert paper.r == tuned.r == 8
    assert set(paper.lora) <= {"target_modules"}  # alpha is 8
    assert tuned.lora == {"lora_alpha": 32, "use_rslora": False, "target_modules": "all-linear"}
    assert tuned.training["lr_scheduler_type"] == "constant"


@pytest.mark.parametrize("name", [*TABLES, "smollm2"])
def test_rates_of_tuned_lora_reach_ten_times_those_of_full_fine_tuning(name):
    rates = {row.name: row.rates for row in load(name).rows}
    assert all(any(abs(10 * rate / tuned - 1) < 1e-9 for tuned in rates["LoRA r=8 (tuned)"]) for rate in rates["SFT"])


@pytest.mark.parametrize("name", TABLES)
def test_steering_and_reft_of_the_paper_have_no_schedule_and_others_have(name):
    for cell in all_cells(load(name)):
        training, steering = cell.settings.training, cell.settings.steering
        if cell.row.startswith(("SFT", "LoRA", "Joint")) and "tuned" not in cell.row:
            assert training["lr_scheduler_type"] == "cosine"
            assert training["warmup_steps"] > 0
        else:
            assert (training["lr_scheduler_type"], training["warmup_steps"]) == ("constant", 0.0)
        assert training["weight_decay"] == 0.0
        batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
        assert (batch, training["num_train_epochs"]) == (8, 3.0 if cell.task == "gsm8k" else 1.0)
        if cell.settings.method in ("low_rank", "vector", "joint_orth"):
            assert steering["init_scale"] == 1e-3


def test_a_default_rate_is_that_of_the_rows_site():
    study = load("smollm2")
    rates = {row.name: study.rates_of(replace(row, rates=()), study.tasks[0]) for row in study.rows}
    assert rates["LoReFT r=8, post_block"] == (5e-4,)
    assert rates["LoReFT r=8, post_mlp"] == (2e-3,)


def test_rows_of_the_demo_have_its_settings():
    study = load("smollm2")
    study = replace(study, tasks=study.tasks[:1], rows=[replace(row, rates=()) for row in study.rows])
    found = {cell.key for cell in all_cells(study)}
    for method in preset.METHODS:
        for seed in (0, 1, 2):
            settings = preset.settings(method, seed)
            assert any(cell.settings == settings for cell in all_cells(study)), method
    assert len(found) == len(study.rows) * 5


def test_a_stage_generates_only_the_rows_that_it_needs():
    study = study_cases.grid()
    cells = all_cells(study)
    assert len(cells) == 24
    for cell in cells:
        sizes = (cell.settings.source["validation"], cell.settings.source["test"])
        assert sizes == ((4, 0) if cell.stage == "rates" else (0, 4))
        assert cell.settings.task == f"steer_listops_synthetic{'_val' if cell.stage == 'rates' else ''}"
        assert cell.settings.source["seed"] == cell.settings.seed == cell.seed


def test_keys_depend_on_settings_and_not_on_names():
    study = study_cases.grid()
    renamed = replace(study, name="other", rows=[replace(row, name=f"my {row.name}") for row in study.rows])
    keys = [cell.key for cell in all_cells(study)]
    assert [cell.key for cell in all_cells(renamed)] == keys
    longer = replace(study, training={"max_steps": 3})
    assert {cell.key for cell in all_cells(longer)}.isdisjoint(keys)


def test_weights_of_full_fine_tuning_are_kept_only_without_an_evaluation():
    kept = {cell.row: cell.settings.keep_weights for cell in all_cells(load("table1"))}
    assert not kept.pop("SFT")
    assert all(kept.values())
    (sft,) = (cell for cell in all_cells(load("table3")) if cell.row == "SFT")
    assert (sft.settings.task, sft.settings.keep_weights) == (None, True)


def test_a_grid_stands_for_a_row_for_each_combination():
    entry = {"name": "r={r} {activation}", "method": "low_rank", "grid": {"r": [1, 8], "activation": [None, "silu"]}}
    rows = study_cases.grid(rows=[entry]).rows
    assert [(row.name, row.r, dict(row.steering)) for row in rows] == [
        ("r=1 linear", 1, {}),
        ("r=1 silu", 1, {"activation": "silu"}),
        ("r=8 linear", 8, {}),
        ("r=8 silu", 8, {"activation": "silu"}),
    ]


GOOD = {"name": "x", "title": "x", "models": ["a/b"], "tasks": ["boolq"], "rows": [{"name": "row", "method": "lora"}]}
ROW = {"name": "row", "method": "lora"}
BAD = {
    "no mapping": ([], "expected a mapping"),
    "an unknown entry": ({**GOOD, "sedes": [0]}, "unknown 'sedes'. A study has name, title"),
    "a missing entry": ({key: GOOD[key] for key in GOOD if key != "rows"}, "'rows' is missing"),
    "an unknown method": (
        {**GOOD, "rows": [{**ROW, "method": "lor"}]},
        "row 'row': no method 'lor'. Choose from",
    ),
    "an unknown task": ({**GOOD, "tasks": ["bolq"]}, "no task 'bolq'"),
    "an unknown preset": ({**GOOD, "preset": "steerling"}, "no preset 'steerling'. Choose from default, paper"),
    "two rows of a name": ({**GOOD, "rows": [ROW, ROW]}, "rows must have different names, got 'row' twice"),
    "no seeds": ({**GOOD, "seeds": []}, "has no seeds"),
    "no models": ({**GOOD, "models": []}, "has no models"),
    "rates that are no numbers": ({**GOOD, "rows": [{**ROW, "rates": ["fast"]}]}, "rates to be a list of numbers"),
    "an unknown entry of a row": ({**GOOD, "rows": [{**ROW, "rank": 8}]}, "unknown 'rank'. A row has name, method"),
    "a name that is a number": ({**GOOD, "rows": [{**ROW, "name": 8}]}, "expected name to be text; put it in quotes"),
    "a name of two lines": ({**GOOD, "rows": [{**ROW, "name": "a\nb"}]}, "expected name to be one line of text"),
    "a title that is a number": ({**GOOD, "title": 7}, "expected title to be text"),
    "a folder outside": ({**GOOD, "name": "../x"}, "A study's name is that of its folder"),
    "models that are no list": ({**GOOD, "models": "embedded"}, "expected models to be a list, got 'embedded'"),
    "an unknown dtype": ({**GOOD, "models": [{"name": "a/b", "dtype": "float12"}]}, "no dtype 'float12'. Choose"),
    "training that is no mapping": ({**GOOD, "training": [1]}, "expected training to be a mapping"),
    "a method that is a list": ({**GOOD, "rows": [{**ROW, "method": ["lora"]}]}, "expected method to be text"),
    "guesses that are no texts": ({**GOOD, "guessed": [5]}, "expected guessed to be a list of texts"),
    "seeds that are no list": ({**GOOD, "seeds": 3}, "expected seeds to be a list, got 3"),
    "a seed twice": ({**GOOD, "seeds": [0, 0]}, "expected seeds to be different integers from 0, got [0, 0]"),
    "a seed below 0": ({**GOOD, "tasks": [{"name": "boolq", "seeds": [-1]}]}, "x, boolq: expected seeds to be"),
    "seeds in a list": ({**GOOD, "seeds": [[0]]}, "expected seeds to be different integers"),
    "a rate twice": ({**GOOD, "rows": [{**ROW, "rates": [1e-3, 1e-3]}]}, "expected rates to be different positive"),
    "a rate of 0": ({**GOOD, "rows": [{**ROW, "rates": [0]}]}, "expected rates to be different positive numbers"),
    "a rate in words": ({**GOOD, "rows": [{**ROW, "rates": "123"}]}, "expected rates to be a list"),
    "a rank that is no number": (
        {**GOOD, "rows": [{**ROW, "r": "8"}]},
        "expected r to be a positive integer, got '8'",
    ),
    "a grid that its names lack": (
        {**GOOD, "rows": [{**ROW, "name": "r={rank}", "grid": {"r": [1, 2]}}]},
        "expected the name of a row with a grid to have {r}, got 'r={rank}'",
    ),
    "a grid beside no mapping": (
        {**GOOD, "rows": [{**ROW, "name": "r={r}", "steering": None, "grid": {"r": [1]}}]},
        "expected steering to be a mapping, got None",
    ),
    "a grid without lists": ({**GOOD, "rows": [{**ROW, "grid": {"r": 8}}]}, "expected grid to be"),
    "rates to choose from without a score": (
        {**GOOD, "tasks": ["alpaca"], "rows": [{**ROW, "rates": [1e-4, 2e-4]}]},
        "alpaca has no validation score to choose from 2 rates",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_study_is_refused_in_a_line(case, tmp_path, capsys):
    contents, message = BAD[case]
    with pytest.raises(StudyError) as refused:
        from_dict(contents)
    assert message in str(refused.value)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(contents))
    assert cli.main([str(file), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("trl-steer reproduce: error: ")
    assert said.count("\n") == 1


def test_a_missing_or_broken_file_and_an_unknown_row_are_a_line(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("rows: [")
    for argv, message in (
        (["nothing"], "Give a file, or one of figure5, sites, smollm2, table1"),
        ([str(tmp_path / "broken.yaml")], "invalid YAML"),
        (["table1", "--rows", "LoRa"], "table1 has no row 'LoRa'. Choose from SFT, LoRA r=8 (paper)"),
        (["status", str(tmp_path)], "Can't read the study"),
    ):
        assert cli.main(argv) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_the_study_in_the_guide_is_valid():
    (block,) = (block for block in pages.blocks("eval/reproduce/README.md") if block.language == "yaml")
    study = from_dict(yaml.safe_load(block.code))
    assert [row.name for row in study.rows][1:3] == ["steering r=1, linear", "steering r=1, silu"]
    assert study.size() == 2 * (3 + 6 * 2 + 8 * 3)


def test_sizes_in_the_guide_are_those_of_the_studies():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", pages.prose("eval/reproduce/README.md"), re.MULTILINE)
    assert {name: int(size) for name, size in rows} == {name: load(name).size() for name in OURS}


def test_rates_may_be_written_without_a_point():
    rows = yaml.safe_load("[{name: row, method: lora, rates: [5e-6, 1e-5]}]")
    assert study_cases.grid(rows=rows).rows[0].rates == (5e-6, 1e-5)
