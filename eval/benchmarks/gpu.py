"""What steering costs on a GPU, at the shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, in bfloat16."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, StaticCache

from trl_steer import LoReftConfig, PostBlockSteeringConfig, steering_operator
from trl_steer.tuners.steering.ops.low_rank import low_rank_update, operator_for

from . import inference, models
from .harness import Result, alternate, compare, synchronize

NAME = "gpu"
OURS, FLOOR, PLAIN = "low rank r=8", "vector", "low rank r=8, plain hook"
LORA, LOREFT, PYREFT, FULL = "LoRA r=8 all-linear", "LoReFT r=8", "LoReFT r=8, pyreft", "full fine-tuning"
BYTES = "moving the bytes once"
CALLS = 20  # of the operator in each measurement, since one takes microseconds
DTYPE = torch.bfloat16


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratios of the operator, of training and of inference. Nothing on a CPU, unless `quick`."""
    if device == "cpu" and not quick:
        return
    yield from _operator(device, repeats, quick)
    yield from _training("Llama-3.2-1B", device, repeats, quick, batch=8, checkpointing=False)
    yield from _training("Llama-3.2-1B", device, repeats, quick, batch=8, checkpointing=True)
    yield from _inference("Llama-3.2-1B", device, repeats, quick)
    if not quick:
        yield from _training("Llama-3.1-8B", device, repeats, quick, batch=4, checkpointing=True)


def _config(name: str, quick: bool) -> LlamaConfig:
    if quick:
        return models.tiny()
    sizes: dict[str, dict[str, Any]] = {
        "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        "Llama-3.1-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    }
    return LlamaConfig(num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, **sizes[name])


# The operator


def _operator(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Forward and backward of one update, compared with a copy and a sum that move the same bytes: `h` and `h'`, then
    `g`, `h'` and `dh`. On a GPU, without the time that launching kernels takes, which is longer."""
    tokens, width, rank = (32, 64, 8) if quick else (8192, 2048, 8)
    h, grad = (torch.randn(tokens, width, device=device, dtype=DTYPE) for _ in range(2))
    for factors in (torch.bfloat16, torch.float32):
        down = torch.randn(rank, width, device=device, dtype=factors) / width**0.5
        up = torch.randn(width, rank, device=device, dtype=factors) / 100
        leaves = [t.clone().requires_grad_() for t in (h, down, up)]
        operator = operator_for(leaves[0], leaves[1], leaves[2])

        def update(leaves=leaves) -> None:
            for _ in range(CALLS):
                torch.autograd.grad(low_rank_update(leaves[0], leaves[1], leaves[2], 1.0), leaves, grad)

        def moves() -> None:
            for _ in range(CALLS):
                h.clone()
                torch.add(h, grad)

        sides = {side: _replayed(call, device) for side, call in ((OURS, update), (BYTES, moves))}
        times = alternate(sides, repeats, device, warmup=3)
        case = f"operator ({operator}), {tokens} x {width}, bfloat16, factors in {str(factors).removeprefix('torch.')}"
        yield compare(NAME, case, times, OURS, BYTES, bound=None if quick else "<= 3")


def _replayed(function: Callable[[], None], device: str) -> Callable[[], None]:
    """On a GPU, a CUDA graph of `function`."""
    function()  # compiles the kernels
    if device != "cuda":
        return function
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


# Training


def _training(name: str, device: str, repeats: int, quick: bool, batch: int, checkpointing: bool) -> Iterator[Result]:
    """Steps and peak memory. With gradient checkpointing also under autocast, as TRL's trainers have it."""
    config = _config(name, quick)
    length = 16 if quick else 512
    tokens = models.random_tokens(config, batch, length, device)
    base = models.build(config, device, DTYPE)
    trained = _trainable(base, checkpointing, full=name.endswith("1B"))
    operator = models.operator_of(trained[OURS], DTYPE)
    steps = {side: _step(side, model, tokens, checkpointing) for side, model in trained.items()}
    shape = "tiny Llama" if quick else name
    case = f"{shape}, batch {batch} x {length}, bfloat16, operator {operator}"
    case += ", gradient checkpointing, autocast" if checkpointing else ""
    bounded = not quick
    times = alternate(steps, repeats, device, warmup=2)
    yield compare(NAME, f"step, {case}", times, OURS, FLOOR, bound="<= 1.03" if bounded else None)
    yield compare(NAME, f"step, {case}", times, LORA, OURS, bound=">= 1.9" if bounded else None)
    for side in [side for side in steps if side not in (OURS, FLOOR, LORA)]:
        yield compare(NAME, f"step, {case}", times, side, OURS)
    if device == "cuda":
        peaks = {side: [_peak(step) / 2**20] for side, step in steps.items()}
        bound = ("<= 1.01" if checkpointing else "<= 0.7") if name.endswith("1B") else None
        yield compare(NAME, f"peak memory beyond weights, {case}", peaks, OURS, LORA, "MiB", bound)
        yield compare(NAME, f"peak memory beyond weights, {case}", peaks, OURS, FLOOR, "MiB")
    del steps, trained, base
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _trainable(base, checkpointing: bool, full: bool) -> dict[str, nn.Module]:
    configs = {
        OURS: PostBlockSteeringConfig(task_type="CAUSAL_LM", r=8),
        FLOOR: PostBlockSteeringConfig(task_type="CAUSAL_LM", steering_type="vector"),
        PLAIN: PostBlockSteeringConfig(task_type="CAUSAL_LM", r=8),
        LORA: LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        LOREFT: LoReftConfig(task_type="CAUSAL_LM", r=8, positions="all"),
    }
    trained: dict[str, nn.Module] = {side: models.adapted(base, config) for side, config in configs.items()}
    with contextlib.suppress(ImportError):
        trained[PYREFT] = _pyreft(base)
    if full:
        trained[FULL] = models.build(base.config, base.device.type, base.dtype)
    for model in trained.values():
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
            model.enable_input_require_grads()  # type: ignore[operator]
    return trained


def _pyreft(base) -> nn.Module:
    """A copy of `base` with pyreft's own module at the output of every block."""
    from pyreft import LoreftIntervention

    model = models.share(base).requires_grad_(False)
    for block in model.model.layers:
        edit = LoreftIntervention(embed_dim=base.config.hidden_size, low_rank_dimension=8, dtype=torch.float32)
        block.edit = edit.to(base.device)
        block.register_forward_hook(lambda block, args, output: block.edit(output))
    return model


def _step(side: str, model: nn.Module, tokens: torch.Tensor, autocast: bool) -> Callable[[], None]:
    training_step = models.training_step(model, tokens)

    def step() -> None:
        operator = steering_operator("plain" if side == PLAIN else "auto")
        with operator, torch.autocast(tokens.device.type, DTYPE, enabled=autocast):
            training_step()

    return step


def _peak(step: Callable[[], None]) -> int:
    """Bytes that a step needs at most, beyond what is allocated before it."""
    synchronize("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize("cuda")
    return torch.cuda.max_memory_allocated() - before


# Inference


def _inference(name: str, device: str, repeats: int, quick: bool) -> Iterator[Result]:
    config = _config(name, quick)
    base = models.build(config, device, DTYPE).eval()
    sides = {inference.BARE: models.share(base), OURS: models.adapted(base, "low_rank").eval()}
    prompts = models.random_tokens(config, 8, 16 if quick else 2048, device)
    prompt = prompts[:1, :8] if quick else prompts[:1, :512]
    stages = {
        "prefill, 8 x 2048": (lambda model: inference.prefill(model, prompts), repeats, "<= 1.02"),
        "decode, eager": (lambda model: inference.decode(model, prompt), 10 * repeats, "<= 1.06"),
        "decode, compiled": (lambda model: _compiled_decode(model, prompt, quick), 10 * repeats, "<= 1.02"),
    }
    for stage, (make, rounds, bound) in stages.items():
        calls = {side: make(model) for side, model in sides.items()}
        times = alternate(calls, rounds, device, warmup=5)
        case = f"{stage}, {'tiny Llama' if quick else name}, bfloat16"
        yield compare(NAME, case, times, OURS, inference.BARE, bound=None if quick else bound)


@torch.no_grad()
def _compiled_decode(model: Any, prompt: torch.Tensor, quick: bool) -> Callable[[], None]:
    """One token after another with a static cache, whose size is what a token costs."""
    length = prompt.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + (64 if quick else 512))
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    compiled = torch.compile(model, backend="eager") if quick else torch.compile(model, mode="reduce-overhead")
    token = prompt[:, -1:].clone()

    @torch.no_grad()
    def decode() -> None:
        compiled(input_ids=token, past_key_values=cache, use_cache=True)

    return decode
