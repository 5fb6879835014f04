"""Generation for evaluation: lm-eval with batches, and one prompt at a time, as in much research code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from trl_steer.tasks import BENCHMARKS

from . import models
from .harness import Result, alternate, compare

NAME = "evaluation"
BATCHED, SINGLE = "lm-eval, batches of 16", "one prompt at a time"
BATCH_SIZE, MAX_NEW_TOKENS = 16, 16
# A generated task with short answers: no download is needed, and a round takes seconds.
TASK = "listops_synthetic"


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratio of the times for the same prompts.

    Raises:
        RuntimeError: The answers are different.
    """
    task = BENCHMARKS[TASK]
    count = 4 if quick else BATCH_SIZE
    prompts = [task.prompt(row) for row in task.rows(test=count, validation=1, train=1)["test"]]
    model, tokenizer = _tiny() if quick else _smollm2()
    model.to(device).eval()
    texts: dict[str, list[str]] = {}
    sides = {
        BATCHED: _batched(model, tokenizer, prompts, device, texts),
        SINGLE: _one_by_one(model, tokenizer, prompts, device, texts),
    }
    times = alternate(sides, repeats, device)
    answers = {side: [task.flexible(text) for text in texts[side]] for side in sides}
    if answers[BATCHED] != answers[SINGLE]:
        raise RuntimeError(f"Batches change the answers: {answers[BATCHED]}, without batches {answers[SINGLE]}.")
    same = sum(a == b for a, b in zip(texts[BATCHED], texts[SINGLE], strict=True))
    case = f"{'tiny Llama' if quick else 'SmolLM2-135M'}, {TASK}, {count} prompts, {same} texts equal"
    yield compare(NAME, case, times, SINGLE, BATCHED, bound=None if quick else ">= 1")


def _batched(model, tokenizer, prompts: list[str], device: str, texts: dict[str, list[str]]) -> Callable[[], None]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, device=device)
    settings = {"do_sample": False, "max_gen_toks": MAX_NEW_TOKENS, "until": []}
    requests = [Instance("generate_until", {}, (prompt, settings), index) for index, prompt in enumerate(prompts)]

    def answer() -> None:
        texts[BATCHED] = lm.generate_until(requests, disable_tqdm=True)

    return answer


def _one_by_one(model, tokenizer, prompts: list[str], device: str, texts: dict[str, list[str]]) -> Callable[[], None]:
    @torch.no_grad()
    def answer() -> None:
        texts[SINGLE] = []
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(device)
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
            text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            texts[SINGLE].append(text)

    return answer


def _smollm2() -> tuple[Any, Any]:
    from ..models import EMBEDDED, load, resolve

    return load(resolve(EMBEDDED), dtype=torch.float32, device="cpu")


def _tiny() -> tuple[Any, Any]:
    """A model with random weights, and a tokenizer for bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    config = models.tiny()
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return models.build(config), tokenizer
