"""Judges: each that the package ships asks what the package itself would ask."""

import pytest
import yaml
from loopback_judge import LoopbackJudge

from trl_steer.eval.alpaca_eval import judges, upstream

EVALUATORS = upstream.folder() / "evaluators_configs"
ELSEWHERE = [path.parent.name for path in EVALUATORS.glob("*/configs.yaml") if "openai_compl" not in path.read_text()]
# A pool of judges, and those whose models complete texts.
NO_CHAT = ["alpaca_farm", "test", "text_davinci_003", "gpt35_turbo_instruct"]
CHAT = sorted({path.parent.name for path in EVALUATORS.glob("*/configs.yaml")} - {*ELSEWHERE, *NO_CHAT})


@pytest.fixture(scope="module")
def server():
    with LoopbackJudge(lambda number, instruction: "no_logprobs") as server:
        yield server


@pytest.mark.parametrize("name", CHAT)
def test_a_shipped_judge_asks_what_the_package_would_ask(name, server):
    judge = judges.resolve(name, endpoint=server.url)
    assert judge.shipped
    annotator = upstream.load().annotators.PairwiseAnnotator(annotators_config=name, caching_path=None)
    (single,) = annotator.annotators.values()
    prompt = single.prompt_template.replace("{instruction}", "Sing.").replace("{output_1}", "La.")
    with upstream.quiet():
        single.fn_completions(
            [prompt],
            **{key: value for key, value in single.completions_kwargs.items() if key != "client_kwargs"},
            openai_api_keys="none",
            openai_api_base=server.url,
            client_config_path="",
            num_procs=1,
        )
    theirs = dict(server.bodies[-1])
    assert theirs.pop("top_p") == 1.0  # which is the API's default
    assert judge.request(prompt) == theirs


def test_more_than_25_shipped_judges_are_compared():
    assert len(CHAT) > 25
    assert judges.LEADERBOARD in CHAT


@pytest.mark.parametrize("name", [*ELSEWHERE, "alpaca_farm"])
def test_a_judge_that_is_not_asked_by_openais_api_is_refused(name):
    with pytest.raises(ValueError, match=r"openai_completions|the name of one judge"):
        judges.resolve(name)


def test_the_endpoint_is_the_given_one_else_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://from.environment/v1/")
    assert judges.resolve(judges.LEADERBOARD, endpoint="http://given/v1").endpoint == "http://given/v1"
    assert judges.resolve(judges.LEADERBOARD).endpoint == "http://from.environment/v1"
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert judges.resolve(judges.LEADERBOARD).endpoint == judges.OPENAI


def written(folder, client, prompt="alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt", **settings) -> str:
    """The path of a judge's YAML file."""
    settings = {"model_name": "m", "client_kwargs": client, **settings}
    (folder / "judge.yaml").write_text(
        yaml.safe_dump({"mine": {"prompt_template": prompt, "completions_kwargs": settings}})
    )
    return str(folder / "judge.yaml")


@pytest.mark.parametrize("variable", [None, "OPENAI_API_KEY"])
def test_judge_file_does_not_send_the_key_to_an_endpoint_that_the_user_did_not_name(tmp_path, variable):
    client = {"base_url": "http://elsewhere/v1", **({"api_key_env": variable} if variable else {})}
    path = written(tmp_path, client)
    with pytest.raises(ValueError, match="Pass --endpoint http://elsewhere/v1 if your key may be sent there"):
        judges.resolve(path)
    assert judges.resolve(path, endpoint="http://elsewhere/v1").endpoint == "http://elsewhere/v1"


def test_shipped_judge_does_not_send_the_key_elsewhere():
    with pytest.raises(ValueError, match="Pass --endpoint https://api"):
        judges.resolve("alpaca_eval_llama3_70b_fn")


def test_judge_file_may_name_an_endpoint_and_the_variable_of_its_key(tmp_path, monkeypatch):
    judge = judges.resolve(written(tmp_path, {"base_url": "http://mine/v1", "api_key_env": "MY_KEY"}))
    assert (judge.endpoint, judge.key_variable) == ("http://mine/v1", "MY_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert judges.read_key(judge.endpoint, None, judge.key_variable) is None
    monkeypatch.setenv("MY_KEY", "mine")
    assert judges.read_key(judge.endpoint, None, judge.key_variable) == "mine"


def test_prompt_of_a_judge_file_is_in_the_same_folder(tmp_path):
    folder = tmp_path / "judges"
    folder.mkdir()
    (folder / "prompt.txt").write_text("Which is better?")
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "below").mkdir()
    (folder / "below" / "secret.txt").write_text("a secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    judge = judges.resolve(written(folder, {}, "prompt.txt"))
    assert judge.request("Which is better?")["messages"] == [{"role": "user", "content": "Which is better?"}]
    for elsewhere in ("../secret.txt", "below/secret.txt", str(tmp_path / "secret.txt"), "link.txt"):
        with pytest.raises(ValueError, match="is neither a file next to it"):
            judges.resolve(written(folder, {}, elsewhere))


def test_judge_settings_replace_those_of_the_file():
    judge = judges.resolve("alpaca_eval_gpt4_turbo_fn", "o3", settings={"max_completion_tokens": 512})
    assert (judge.request("x")["model"], judge.settings["max_completion_tokens"]) == ("o3", 512)
    assert not judge.shipped
    with pytest.raises(ValueError, match="api_key cannot be set"):
        judges.resolve(judges.LEADERBOARD, settings={"api_key": "x"})


def test_settings_that_change_answers_change_their_cache_folder(tmp_path):
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
        ("[1, 2]", "must be YAML with the name of one judge"),
        ("a: {b: [}", "must be YAML"),
        ("a: {completions_kwargs: {max_tokens: 1}}", "including model_name"),
        ("a: {completions_kwargs: [1]}", "including model_name"),
        (
            "a: {prompt_template: nowhere.txt, completions_kwargs: {model_name: m}}",
            "'nowhere.txt' is neither a file next to it",
        ),
    ],
)
def test_file_that_is_not_a_judge_is_an_error(tmp_path, text, said):
    (tmp_path / "judge.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        judges.resolve(str(tmp_path / "judge.yaml"))
