"""Judges: each that the package ships asks what the package itself would ask."""

import pytest

from trl_steer.eval.alpaca_eval import judges, package

PROVIDERS_ELSEWHERE = ("anthropic", "cohere", "bedrock", "google", "replicate", "vllm")


def annotators(config) -> dict:
    return package.load().annotators.PairwiseAnnotator(annotators_config=config, caching_path=None).annotators


def settings(annotator) -> dict:
    """What a request depends on, without the endpoint, which is passed on when a request is made."""
    chosen = dict(annotator.completions_kwargs)
    if client := {name: value for name, value in chosen.pop("client_kwargs", {}).items() if name != "base_url"}:
        chosen["client_kwargs"] = client
    names = ("prompt_template", "batch_size", "completion_key", "fn_completions")
    parser = (annotator.fn_completion_parser.func, annotator.fn_completion_parser.keywords)
    return {"kwargs": chosen, "parser": parser, **{name: getattr(annotator, name) for name in names}}


def test_every_shipped_judge_asks_what_the_package_would_ask(tmp_path):
    compared = []
    for name in judges.names():
        judge = judges.resolve(name)
        assert judge.shipped
        if any(elsewhere in str(judge.annotators) for elsewhere in PROVIDERS_ELSEWHERE):
            continue  # their own packages are not installed
        ours, theirs = annotators(judge.write(tmp_path)), annotators(name)
        assert {key: settings(each) for key, each in ours.items()} == {
            key: settings(each) for key, each in theirs.items()
        }
        compared.append(name)
    assert judges.LEADERBOARD in compared
    assert len(compared) > 25


def test_the_endpoint_is_the_given_one_else_the_judges_own_else_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://from.environment/v1/")
    assert judges.resolve("alpaca_eval_llama3_70b_fn").endpoint == "https://api.together.xyz/v1"
    assert judges.resolve("alpaca_eval_llama3_70b_fn", endpoint="http://given/v1").endpoint == "http://given/v1"
    assert judges.resolve(judges.LEADERBOARD).endpoint == "http://from.environment/v1"
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert judges.resolve(judges.LEADERBOARD).endpoint == judges.OPENAI


def test_keys_are_not_in_what_a_judge_shows(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first-of-two-keys,sk-second-of-two-keys")
    judge = judges.resolve(judges.LEADERBOARD)
    assert judge.keys == ("sk-first-of-two-keys", "sk-second-of-two-keys")
    assert "of-two-keys" not in repr(judge) + str(judge.describe())


def test_whatever_changes_an_answer_changes_the_place_of_answers(tmp_path):
    places = {
        judges.resolve(judges.LEADERBOARD, model, endpoint).folder(tmp_path)
        for model in (None, "another-model")
        for endpoint in ("http://one/v1", "http://two/v1")
    }
    assert len(places) == 4
    same = judges.resolve(judges.LEADERBOARD, endpoint="http://one/v1/")
    assert same.folder(tmp_path) in places


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "should map the judge's name"),
        ("a: {prompt_template: nowhere.txt}", "'nowhere.txt', is no file beside it"),
        ("a: {b: [}", "is not YAML"),
        ("a: {prompt_template: alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt}", "should have a model_name"),
        (
            "a: {prompt_template: alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt, completions_kwargs: [1]}",
            "should be mappings",
        ),
    ],
)
def test_a_file_that_is_no_judge_is_said(tmp_path, text, said):
    (tmp_path / "judge.yaml").write_text(text)
    with pytest.raises(judges.JudgeError, match=said):
        judges.resolve(str(tmp_path / "judge.yaml"))
