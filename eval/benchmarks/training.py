"""A training step and the memory that autograd keeps for it, compared with a vector, the plain operator and LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel

from trl_steer import steering_operator

from . import models
from .harness import Result, alternate, compare
from .memory import saved_bytes

NAME = "training"
OURS, FLOOR, PLAIN, LORA = "low rank r=8", "vector", "low rank r=8, plain hook", "LoRA r=8 all-linear"
SIDES = {OURS: "low_rank", FLOOR: "vector", PLAIN: "low_rank", LORA: "lora"}


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratios of bytes and seconds for each dtype, with and without gradient checkpointing."""
    config = models.tiny() if quick else models.eight_blocks()
    batch, length = (2, 16) if quick else (4, 256)
    for dtype in (torch.float32, torch.bfloat16):
        base = models.build(config, device, dtype)
        tokens = models.random_tokens(config, batch, length, device)
        for checkpointing in (False, True):
            trained = {side: _trainable(base, adapter, checkpointing) for side, adapter in SIDES.items()}
            operator = models.operator_of(trained[OURS], dtype)
            case = f"{_describe(config, batch, length)}, {str(dtype).removeprefix('torch.')}, operator {operator}"
            case += ", gradient checkpointing" if checkpointing else ""
            yield from _bytes(case, trained, tokens, None if quick else dtype)
            bounded = not (quick or checkpointing) and dtype == torch.float32
            yield from _seconds(case, trained, tokens, device, repeats, bounded)


def measure_bytes(config, dtype: torch.dtype, checkpointing: bool, batch: int = 4, length: int = 256) -> dict:
    """Bytes that autograd keeps, for each side. They are deterministic, and used in a test."""
    base = models.build(config, "cpu", dtype)
    tokens = models.random_tokens(config, batch, length, "cpu")
    return _measure({side: _trainable(base, adapter, checkpointing) for side, adapter in SIDES.items()}, tokens)


def _describe(config, batch: int, length: int) -> str:
    return f"Llama {config.num_hidden_layers} x {config.hidden_size}, batch {batch} x {length}"


def _trainable(base, adapter: str, checkpointing: bool) -> PeftModel:
    model = models.adapted(base, adapter)
    model.train()
    if checkpointing:
        # As in TRL's trainers.
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def _measure(trained: dict[str, PeftModel], tokens: torch.Tensor) -> dict[str, int]:
    measured = {}
    for side, model in trained.items():
        with _operator(side):
            measured[side] = saved_bytes(_loss(model, tokens), model)
    return measured


def _bytes(case: str, trained: dict[str, PeftModel], tokens: torch.Tensor, dtype: torch.dtype | None):
    measured = {side: [value / 2**20] for side, value in _measure(trained, tokens).items()}
    bound = {torch.float32: "<= 1.02", torch.bfloat16: "<= 1.08"}[dtype] if dtype else None
    yield compare(NAME, f"saved bytes, {case}", measured, OURS, FLOOR, "MiB", bound)
    yield compare(NAME, f"saved bytes, {case}", measured, PLAIN, FLOOR, "MiB")
    yield compare(NAME, f"saved bytes, {case}", measured, LORA, OURS, "MiB")


def _seconds(case: str, trained: dict[str, PeftModel], tokens: torch.Tensor, device: str, repeats: int, bounded: bool):
    steps = {side: _step(side, model, tokens) for side, model in trained.items()}
    # The time of a step varies by 10% if other processes use the machine, more than the bound allows.
    times = alternate(steps, repeats * (5 if bounded else 1), device)
    yield compare(NAME, f"step, {case}", times, OURS, FLOOR, bound="<= 1.03" if bounded else None)
    yield compare(NAME, f"step, {case}", times, PLAIN, OURS)
    yield compare(NAME, f"step, {case}", times, LORA, OURS, bound=">= 1.15" if bounded else None)


def _operator(side: str) -> steering_operator:
    return steering_operator("plain" if side == PLAIN else "auto")


def _loss(model: PeftModel, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _step(side: str, model: PeftModel, tokens: torch.Tensor) -> Callable[[], None]:
    training_step = models.training_step(model, tokens)

    def step() -> None:
        with _operator(side):
            training_step()

    return step
