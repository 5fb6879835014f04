"""The cost of the orthogonality constraint and of a training step of joint adaptation.

This benchmark determined the size of the CPU buffer in `joint_steering/projection.py`: above 32 MiB, page faults of
new allocations take longer than the arithmetic.
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
    """Yields the ratios of the dense form and the projection, of the projections and a joint training step, and of a
    joint training step and one of LoRA with as many parameters."""
    # First, because the dense form is faster when it can reuse memory of other measurements.
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
    # Two steps first, because LoRA's `B` is initialized to zero.
    steps = {JOINT: models.training_step(joint, tokens, constraint), lora_side: models.training_step(lora, tokens)}
    alternate(steps, 2, device)

    joint(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    weights: list[torch.Tensor] = [pair.steering_matrix("default", "output") for pair in constraint.pairs]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    # Projecting weights that are already orthogonal would be faster.
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

    def restarted(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            # Included on both sides. Projecting a projected matrix again would be faster for ours.
            torch._foreach_copy_(weights, start)
            function()

        return run

    times = alternate({OURS: restarted(gram), DENSE: restarted(dense)}, repeats, device)
    case = f"{BLOCKS} blocks, d={d}, r={RANK}"
    return compare(NAME, case, times, DENSE, OURS, bound=">= 100" if bounded else None)


def _rank_of_as_many_parameters(base, joint: PeftModel) -> int:
    of_rank_one = models.adapted(base, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    return round(_trainable(joint) / _trainable(of_rank_one))


def _trainable(model: PeftModel) -> int:
    return model.get_nb_trainable_parameters()[0]
