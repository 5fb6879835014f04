"""Joint adaptation: what the orthogonality constraint costs, and a training step with it.

What the projection learned here about memory on a CPU: glibc maps requests above 32 MiB anew each time, and faulting
that memory in page by page costs more than the arithmetic, so blocks are projected in parts of 16 MiB. The parts share
one buffer, because of two glibc gives the upper one back to the system after each use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, PeftModel

from trl_steer import JointSteeringConfig
from trl_steer.tuners.joint_steering import OrthogonalityConstraint
from trl_steer.tuners.joint_steering.projection import project_

from . import models
from .harness import Result, alternate, compare

NAME = "projection"
OURS, DENSE = "Gram form, float64", "dense d x d, float32"
JOINT, PROJECTION = "joint r=8 + 8", "both projections"
BLOCKS, RANK = 32, 8


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the dense form's cost, the projection's share of a training step, and LoRA's of as many parameters."""
    # Before anything else has filled the heap and freed it: from there the dense form would get its d x d matrices
    # three times as fast as from the system.
    for d in (64,) if quick else (2048, 4096):
        yield _against_dense(d, device, repeats, bounded=d == 4096 and device == "cpu")
    config = models.tiny() if quick else models.eight_blocks()
    batch, length = (2, 16) if quick else (4, 256)
    yield from _training(config, batch, length, device, repeats, bounded=not quick)


def _training(config, batch: int, length: int, device: str, repeats: int, bounded: bool) -> Iterator[Result]:
    base = models.build(config, device)
    tokens = models.random_tokens(config, batch, length, device)
    joint = models.adapted(base, JointSteeringConfig(r=RANK, steering={"r": RANK}, task_type="CAUSAL_LM"))
    rank = _rank_of_as_many_parameters(base, joint)
    lora_side = f"LoRA r={rank} all-linear"
    lora = models.adapted(base, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    for model in (joint, lora):
        model.train()
    constraint = OrthogonalityConstraint(joint, "default")
    # Two steps: what LoRA's `B` holds at first is zero, which nothing is orthogonal to or not.
    steps = {JOINT: models.training_step(joint, tokens, constraint), lora_side: models.training_step(lora, tokens)}
    alternate(steps, 2, device)

    joint(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    weights: list[torch.Tensor] = [pair.steering_matrix("default", "output") for pair in constraint.pairs]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    # What is orthogonal already is left alone, so each time has to start from what is not.
    generator = torch.Generator().manual_seed(0)
    overlapping = [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]

    @torch.no_grad()
    def project() -> None:
        torch._foreach_copy_(gradients, overlapping)
        torch._foreach_copy_(weights, overlapping)
        constraint.project_gradients()
        constraint.project()

    times = alternate({PROJECTION: project, **steps}, repeats, device)
    case = f"Llama {config.num_hidden_layers} x {config.hidden_size}, batch {batch} x {length}, float32"
    share = compare(NAME, f"share of a step, {case}", times, PROJECTION, JOINT, bound="<= 0.01" if bounded else None)
    yield share
    yield compare(NAME, f"step, {case}", times, JOINT, lora_side)


def _against_dense(d: int, device: str, repeats: int, bounded: bool) -> Result:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(d, RANK, generator=generator).to(device) for _ in range(BLOCKS)]  # noqa: E731
    outputs, start = draw(), draw()
    weights = [weight.clone() for weight in start]

    def gram() -> None:
        project_([([B], W) for B, W in zip(outputs, weights, strict=True)])

    @torch.no_grad()
    def dense() -> None:
        for B, W in zip(outputs, weights, strict=True):
            Q = torch.linalg.svd(B, full_matrices=False).U
            W.copy_((torch.eye(d, device=device) - Q @ Q.mT) @ W)

    def anew(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            # The copy counts for both sides; a projected matrix projected again would be less work for ours.
            torch._foreach_copy_(weights, start)
            function()

        return run

    times = alternate({OURS: anew(gram), DENSE: anew(dense)}, repeats, device)
    case = f"{BLOCKS} blocks, d={d}, r={RANK}"
    return compare(NAME, case, times, DENSE, OURS, bound=">= 100" if bounded else None)


def _rank_of_as_many_parameters(base, joint: PeftModel) -> int:
    of_rank_one = models.adapted(base, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    return round(_trainable(joint) / _trainable(of_rank_one))


def _trainable(model: PeftModel) -> int:
    return model.get_nb_trainable_parameters()[0]
