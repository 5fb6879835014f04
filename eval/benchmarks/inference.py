"""Prefill and decoding of one token, compared with the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache

from . import models
from .harness import Result, alternate, compare

NAME = "inference"
BARE, OURS, LORA = "bare model", "low rank r=8", "LoRA r=8 all-linear, unmerged"
# Decoding a token takes milliseconds, so that many rounds are needed.
DECODES_PER_REPEAT, PREFILLS_PER_REPEAT = 30, 12


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratios for prefill, then for decoding."""
    config = models.tiny() if quick else models.smollm2_135m()
    length, cached = (16, 8) if quick else (256, 64)
    name = "tiny Llama" if quick else "SmolLM2-135M"
    base = models.build(config, device).eval()
    sides = {
        BARE: models.share(base),
        OURS: models.adapted(base, "low_rank").eval(),
        LORA: models.adapted(base, "lora").eval(),
    }
    bounded = not quick and device == "cpu"
    for stage, make, size, rounds, bound in (
        ("prefill", prefill, length, PREFILLS_PER_REPEAT, "<= 1.02"),
        ("decode", decode, cached, DECODES_PER_REPEAT, "<= 1.05"),
    ):
        tokens = models.random_tokens(config, 1, size, device)
        runs = {side: make(model, tokens) for side, model in sides.items()}
        times = alternate(runs, repeats * rounds, device, warmup=3)
        with torch.no_grad():
            operator = models.operator_of(sides[OURS], torch.float32)
        case = f"{stage}, {name}, float32, operator {operator}, " + (
            f"{size} tokens" if stage == "prefill" else f"1 token after {size}"
        )
        yield compare(NAME, case, times, OURS, BARE, bound=bound if bounded else None)
        yield compare(NAME, case, times, LORA, BARE)


def prefill(model, tokens: torch.Tensor) -> Callable[[], None]:
    """A forward pass over all tokens."""

    @torch.no_grad()
    def run() -> None:
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)

    return run


def decode(model, tokens: torch.Tensor) -> Callable[[], None]:
    """A forward pass over one token after these, always the same."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = tokens[:, -1:]

    @torch.no_grad()
    def run() -> None:
        model(input_ids=last, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run
