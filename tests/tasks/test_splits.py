"""Which rows train, choose and test; and where they come from."""

import json

import datasets
import pytest
import task_rows

from trl_steer.tasks import SIX, TASKS, get_task, load_task
from trl_steer.tasks.splits import disjoint, draw, permutation

BENCHMARKS = [task.name for task in SIX]


def numbered(count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"number": list(range(count))})


@pytest.mark.parametrize(("count", "share"), [(10, 0.2), (101, 0.2), (1267, 0.5), (9248, 0.2)])
def test_split_indices_equal_those_of_the_installed_datasets(count, share):
    stay, drawn = draw(count, share, seed=42)
    theirs = numbered(count).train_test_split(test_size=share, seed=42)
    assert stay == theirs["train"]["number"][:]
    assert drawn == theirs["test"]["number"][:]
    assert permutation(count, seed=7) == numbered(count).shuffle(seed=7)["number"][:]


def test_split_indices_are_pinned():
    assert permutation(12) == [0, 7, 6, 9, 11, 3, 5, 2, 4, 10, 1, 8]
    assert draw(12, 0.2) == ([9, 11, 3, 5, 2, 4, 10, 1, 8], [0, 7, 6])


def test_disjoint_keeps_test_whole_and_takes_from_validation_and_train():
    parts = {
        "train": datasets.Dataset.from_dict({"a": ["x", "y", "z", "z"]}),
        "validation": datasets.Dataset.from_dict({"a": ["x", "w"]}),
        "test": datasets.Dataset.from_dict({"a": ["w"]}),
    }
    kept = disjoint(parts, ("a",))
    assert {name: rows["a"][:] for name, rows in kept.items()} == {
        "train": ["y", "z", "z"],
        "validation": ["x"],
        "test": ["w"],
    }


# Sizes of (train, validation, test) for the sizes in `task_rows.LAYOUT`.
WRITTEN = {
    "boolq": {"default": (24, 7, 9), "steerling": (31, 7, 2)},
    "winogrande": {"default": (24, 6, 10), "steerling": (30, 5, 5)},
    "arc_challenge": {"default": (20, 7, 11), "steerling": (20, 3, 4)},
    "gsm8k": {"default": (24, 6, 10), "steerling": (30, 2, 8)},
    "aqua": {"default": (20, 8, 9), "steerling": (20, 8, 9)},
    "listops": {"default": (20, 8, 9), "steerling": (20, 8, 9)},
}


@pytest.mark.parametrize("splits", ["default", "steerling"])
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_loaded_splits_are_prompt_completion_and_do_not_overlap(hub, benchmark, splits):
    loaded = load_task(benchmark, splits)
    assert tuple(len(loaded[name]) for name in ("train", "validation", "test")) == WRITTEN[benchmark][splits]
    assert all(rows.column_names == ["prompt", "completion"] for rows in loaded.values())
    prompts = [prompt for rows in loaded.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)
    again = load_task(benchmark, splits)
    assert {name: rows.to_list() for name, rows in loaded.items()} == {
        name: rows.to_list() for name, rows in again.items()
    }


@pytest.mark.parametrize("benchmark", ["boolq", "winogrande", "gsm8k"])
def test_validation_is_what_train_test_split_draws_from_train(hub, benchmark):
    path, config, _ = task_rows.LAYOUT[benchmark]
    drawn = datasets.load_dataset(path, config)["train"].train_test_split(test_size=0.2, seed=42)
    parts = get_task(benchmark).rows()
    assert parts["validation"].to_list() == drawn["test"].to_list()
    assert parts["train"].to_list() == drawn["train"].to_list()


def steerling_boolq(published):
    halves = published["validation"].shuffle(seed=42).train_test_split(test_size=0.20, seed=42)
    return {"train": published["train"], "validation": halves["train"], "test": halves["test"]}


def steerling_winogrande(published):
    halves = published["validation"].shuffle(seed=42).train_test_split(test_size=0.50, seed=42)
    return {"train": published["train"], "validation": halves["train"], "test": halves["test"]}


def steerling_arc_challenge(published):
    halves = published["validation"].shuffle(seed=42).train_test_split(test_size=0.50, seed=42)
    return {"train": published["train"], "validation": halves["train"], "test": halves["test"]}


def steerling_gsm8k(published):
    halves = published["test"].shuffle(seed=42).train_test_split(test_size=0.20, seed=42)
    return {"train": published["train"], "validation": halves["test"], "test": halves["train"]}


@pytest.mark.parametrize(
    "theirs",
    [steerling_boolq, steerling_winogrande, steerling_arc_challenge, steerling_gsm8k],
    ids=lambda f: f.__name__,
)
def test_steerling_splits_are_those_of_the_authors_calls(hub, theirs):
    benchmark = theirs.__name__.removeprefix("steerling_")
    path, config, _ = task_rows.LAYOUT[benchmark]
    expected = theirs(datasets.load_dataset(path, config))
    parts = get_task(benchmark).rows("steerling")
    assert {name: rows.to_list() for name, rows in parts.items()} == {
        name: rows.to_list() for name, rows in expected.items()
    }


def test_unknown_splits_are_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"no splits 'paper'.*default, steerling"):
        load_task("boolq", "paper")


# DESIGN's counts: test in full, validation official or 20% of train rounded up, train the rest.
REAL = {
    ("boolq", None): (7541, 1886, 3270),
    ("boolq", "boolq_offline"): (2092, 524, 654),
    ("winogrande", None): (7398, 1850, 1267),
    ("arc_challenge", None): (1119, 299, 1172),
    ("gsm8k", None): (5978, 1495, 1319),
    ("aqua", None): (None, 254, 254),
    ("aqua", "raw_offline"): (2724, 254, 254),
    ("listops", None): (8000, 2000, 2000),
}


@pytest.mark.parametrize(("benchmark", "config"), REAL)
def test_real_splits_have_the_designs_counts_and_do_not_overlap(mirror, benchmark, config):
    parts = load_task(benchmark, config=config)
    expected = dict(zip(("train", "validation", "test"), REAL[benchmark, config], strict=True))
    assert {name: len(rows) for name, rows in parts.items()} == {k: v for k, v in expected.items() if v is not None}
    prompts = {name: set(rows["prompt"]) for name, rows in parts.items()}
    assert not prompts["validation"] & prompts["test"]
    assert not prompts.get("train", set()) & (prompts["validation"] | prompts["test"])


def test_real_steerling_splits_have_the_authors_counts(mirror):
    counts = {
        name: {part: len(rows) for part, rows in TASKS[name].rows("steerling").items() if part != "train"}
        for name in ("boolq", "winogrande", "arc_challenge", "gsm8k")
    }
    assert counts == {
        "boolq": {"validation": 2616, "test": 654},
        "winogrande": {"validation": 633, "test": 634},
        "arc_challenge": {"validation": 149, "test": 150},
        "gsm8k": {"validation": 264, "test": 1055},
    }


def private_copy(folder):
    task_rows.write_config(folder / "mine", "small", {"train": 10, "validation": 4}, task_rows.rows_of("boolq"))
    return folder / "mine"


def test_path_and_config_can_be_given(hub, tmp_path):
    loaded = load_task("boolq", dataset_path=str(private_copy(tmp_path)), config="small")
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 8, "validation": 2, "test": 4}


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("benchmark", ["gsm8k", "winogrande"])
def test_a_copy_with_one_config_needs_no_name_for_it(benchmark, ending, tmp_path):
    rows = task_rows.rows_of(benchmark)
    (tmp_path / "mine").mkdir()
    for split, part in {"train": rows[:20], "validation": rows[20:30], "test": rows[30:40]}.items():
        data = datasets.Dataset.from_list(part)
        (data.to_parquet if ending == "parquet" else data.to_json)(tmp_path / "mine" / f"{split}.{ending}")
    loaded = load_task(benchmark, dataset_path=str(tmp_path / "mine"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 16, "validation": 4, "test": 10}
    with pytest.raises(ValueError, match="not found"):
        load_task(benchmark, dataset_path=str(tmp_path / "mine"), config="large")


def test_changed_copy_is_read_anew(hub, tmp_path):
    copy = str(private_copy(tmp_path))
    assert len(load_task("boolq", dataset_path=copy, config="small")["test"]) == 4
    task_rows.write_config(tmp_path / "mine", "small", {"train": 10, "validation": 6}, task_rows.rows_of("boolq"))
    assert len(load_task("boolq", dataset_path=copy, config="small")["test"]) == 6


def test_environment_names_a_copy_and_an_argument_beats_it(hub, tmp_path, monkeypatch):
    entry = {"dataset_path": str(private_copy(tmp_path)), "config": "small"}
    monkeypatch.setenv("TRL_STEER_DATASETS", json.dumps({"boolq": entry}))
    assert len(load_task("boolq")["test"]) == 4
    assert len(load_task("gsm8k")["test"]) == 10
    with pytest.raises(ValueError, match="not found"):
        load_task("boolq", config="large")


def test_environment_names_a_mirror_for_programs_that_run_elsewhere(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_STEER_HUB_MIRROR", str(hub))
    assert len(load_task("gsm8k")["test"]) == 10


@pytest.mark.parametrize("text", ["boolq", "[1]", '{"boolq": "boolq_offline"}'])
def test_environment_that_is_no_object_of_objects_is_an_error_that_shows_one(hub, monkeypatch, text):
    monkeypatch.setenv("TRL_STEER_DATASETS", text)
    with pytest.raises(ValueError, match=r'TRL_STEER_DATASETS must be a JSON object like \{"boolq"'):
        load_task("boolq")


def test_source_entry_that_does_not_exist_is_an_error_that_lists_those_that_do(hub):
    with pytest.raises(ValueError, match=r"no entry subset.*dataset_path, config"):
        load_task("boolq", subset="boolq_offline")


def test_dataset_that_cannot_be_reached_says_how_to_name_a_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises((ConnectionError, FileNotFoundError)) as caught:
        load_task("boolq", dataset_path="./nowhere")
    assert "TRL_STEER_HUB_MIRROR" in caught.value.__notes__[0]


def test_copy_without_training_rows_still_gives_the_other_splits(hub, tmp_path):
    task_rows.write_config(tmp_path / "aqua", "raw", {"validation": 3, "test": 4}, task_rows.rows_of("aqua"))
    loaded = load_task("aqua", dataset_path=str(tmp_path / "aqua"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"validation": 3, "test": 4}


def test_synthetic_listops_needs_no_source_and_follows_its_seed():
    sizes = {"train": 20, "validation": 10, "test": 10}
    first, other = load_task("listops_synthetic", **sizes), load_task("listops_synthetic", seed=7, **sizes)
    assert {name: len(rows) for name, rows in first.items()} == sizes
    assert first["test"].to_list() == load_task("listops_synthetic", **sizes | {"train": 1})["test"].to_list()
    assert first["test"].to_list() != other["test"].to_list()
