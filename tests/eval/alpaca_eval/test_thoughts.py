"""Reasoning models: thoughts are no part of an answer, and what is not answered is said with a way out."""

import json
import re

import alpaca_judging
import pytest
from loopback_judge import LoopbackJudge
from tiny_chat import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

from trl_steer.eval.alpaca_eval import cli, thoughts
from trl_steer.eval.alpaca_eval.journal import Journal
from trl_steer.eval.alpaca_eval.local_model import LocalModel

PATTERN = re.compile(thoughts.PATTERN, re.DOTALL)


def whole(**message):
    """A completion with this message."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}, "logprobs": None}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def generate(server, reference_folder, output, *more):
    arguments = ["--model", "m", "--reference", str(reference_folder), "--output", str(output), "--limit", "3"]
    return cli.main(["generate", *arguments, "--endpoint", server.url, *more])


def texts(folder):
    return [row["output"] for row in json.loads((folder / "model_outputs.json").read_text())]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("Hi", "Hi"),
        ("<think>plan\n\nmore</think>\n\nHi", "Hi"),
        ("plan</think>Hi", "Hi"),  # the template wrote the opening tag
        ("<think>plan", ""),  # no token was left for the answer
        ("<think></think>\nHi", "Hi"),
        ("Well. <think>plan</think> Hi", "Well.  Hi"),
        ("<think>one</think>Hi<think>two</think> there", "Hi there"),
        ("[THINK]plan[/THINK]Hi", "Hi"),
        ("<|channel|>analysis<|message|>plan<|end|><|start|>assistant<|channel|>final<|message|>Hi", "Hi"),
        ("I think that 1 < 2 > 0.", "I think that 1 < 2 > 0."),
    ],
)
def test_thoughts_are_taken_out_of_an_answer_and_nothing_else(written, answer):
    found = thoughts.split(written, PATTERN)
    assert found.text == answer
    assert bool(found.thought) == (answer != written)
    assert thoughts.split(written, None).text == written


def test_a_served_models_thoughts_are_kept_beside_its_outputs(reference_folder, tmp_path):
    with LoopbackJudge(lambda number, instruction: whole(content="<think>plan</think>Hi")) as server:
        assert generate(server, reference_folder, tmp_path / "run") == 0
    assert texts(tmp_path / "run") == ["Hi"] * 3
    assert "plan" not in (tmp_path / "run" / "model_outputs.json").read_text()
    kept = [each for record in Journal(tmp_path / "run" / "progress.jsonl").read() for each in record["outputs"]]
    assert {each["thought"] for each in kept} == {"<think>plan</think>"}


def test_no_strip_thoughts_keeps_thoughts(reference_folder, tmp_path):
    with LoopbackJudge(lambda number, instruction: whole(content="<think>plan</think>Hi")) as server:
        assert generate(server, reference_folder, tmp_path / "run", "--no-strip-thoughts") == 0
    assert texts(tmp_path / "run") == ["<think>plan</think>Hi"] * 3


def test_thought_pattern_can_be_set(reference_folder, tmp_path):
    with LoopbackJudge(lambda number, instruction: whole(content="(plan\n)Hi")) as server:
        assert generate(server, reference_folder, tmp_path / "run", "--thought-pattern", r"\(.*?\)") == 0
    assert texts(tmp_path / "run") == ["Hi"] * 3


def test_invalid_thought_pattern_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--model", "m", "--output", "o", "--thought-pattern", "("])
    assert "not a regular expression" in capsys.readouterr().err


def test_thoughts_in_a_field_of_their_own_are_kept_too(reference_folder, tmp_path):
    with LoopbackJudge(lambda number, instruction: whole(content="Hi", reasoning_content="plan")) as server:
        assert generate(server, reference_folder, tmp_path / "run") == 0
    assert texts(tmp_path / "run") == ["Hi"] * 3
    assert Journal(tmp_path / "run" / "progress.jsonl").read()[0]["outputs"][0]["thought"] == "plan"


@pytest.mark.parametrize(
    ("message", "said"), [({}, "finish_reason stop"), ({"refusal": "I will not."}, "I will not.")]
)
def test_answer_without_text_is_an_error_with_a_solution(reference_folder, tmp_path, capsys, message, said):
    with LoopbackJudge(lambda number, instruction: whole(content=None, **message)) as server:
        assert generate(server, reference_folder, tmp_path / "run") == 1
        shown = capsys.readouterr().err
        assert said in shown
        assert "--max-new-tokens" in shown
        assert "--allow-empty" in shown
        assert generate(server, reference_folder, tmp_path / "run", "--allow-empty") == 0
    assert texts(tmp_path / "run") == [""] * 3
    assert "3 EMPTY" in capsys.readouterr().out


@pytest.mark.parametrize("opened", [True, False])
def test_a_local_models_thoughts_are_taken_out_also_behind_a_tag_of_the_template(tmp_path, opened):
    import torch

    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + ("<think>\n" if opened else "")
    tokenizer.save_pretrained(tmp_path)
    model = LocalModel(str(tmp_path), device="cpu", pattern=PATTERN)

    def writes(text):
        new = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        model.model.generate = lambda input_ids, **_: torch.cat([input_ids, new], dim=1)
        return model.answer(["Sing."])[0].text

    assert writes("plan</think>\nHi<|im_end|>") == "Hi"
    assert writes("plan, and on") == ("" if opened else "plan, and on")


@pytest.mark.parametrize("command", ["generate", "judge"])
def test_the_name_of_the_limit_that_an_endpoint_takes_is_used(outputs, reference_folder, tmp_path, command):
    with LoopbackJudge(lambda number, instruction: "refuses_max_tokens") as server:
        if command == "judge":
            assert alpaca_judging.judge(outputs, reference_folder, server.url) == 0
        else:
            assert generate(server, reference_folder, tmp_path / "run", "--in-flight", "1") == 0
        limits = [name for body in server.bodies for name in body if name.startswith("max_")]
    assert limits == ["max_tokens"] + ["max_completion_tokens"] * (len(limits) - 1)
    assert len(limits) == (25 if command == "judge" else 4)


def test_a_judges_thoughts_are_not_read_as_its_verdict(outputs, reference_folder):
    with LoopbackJudge(lambda number, instruction: whole(content="<think>1 9</think>8 3")) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--judge", "lmsys_gpt4") == 0
        (journal,) = (outputs.parent / "cache").rglob("answers.jsonl")
        assert "<think>1 9</think>8 3" in journal.read_text()
        # With another pattern the same answers are read anew, and asked for where they cannot be read.
        assert server.requests == 24
    annotations = alpaca_judging.annotations(outputs.parent)
    assert {row["preference_raw_completion"] for row in annotations} == {"8 3"}


@pytest.mark.parametrize(("message", "said"), [({}, "has no text"), ({"refusal": "I will not."}, "I will not.")])
def test_judge_answer_without_text_is_an_error_with_a_solution(outputs, reference_folder, capsys, message, said):
    with LoopbackJudge(lambda number, instruction: whole(content=None, **message)) as server:
        assert alpaca_judging.judge(outputs, reference_folder, server.url, "--judge", "lmsys_gpt4") == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "--judge-setting max_tokens=N" in shown


def test_a_judges_settings_can_be_set(outputs, reference_folder, judge):
    more = ("--judge", "alpaca_eval_gpt4_turbo_fn", "--judge-setting", "max_tokens=512")
    assert alpaca_judging.judge(outputs, reference_folder, judge.url, *more) == 0
    assert {body["max_tokens"] for body in judge.bodies} == {512}
    assert alpaca_judging.result(outputs.parent)["judge"]["settings"]["max_tokens"] == 512
