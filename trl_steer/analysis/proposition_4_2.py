r"""Tests Proposition 4.2 of arXiv 2603.00425: do weight and steering updates learn the same subspace?

The model is `y = W phi(x) + S (x + phi(x))`, with a weight update on features and a steering update on the residual
stream. Both are low-rank, `W = B A` and `S = U D`, with `B = U = 0` at initialization. They are trained by full-batch
gradient descent on the mean squared error to a teacher.

There are `d` independent standard normal latents `u_i`. With an orthogonal `V` and `a_i = 1 / (1 + i)`, inputs are
`x = V diag(3 a) u` and features `phi(x) = V diag(1.6 b) tanh(u)`. The teacher is `y = T phi(x) + T (x + phi(x))` with
a random orthogonal `T`, plus noise.

- *coinciding* teacher: `b = a`. The largest latents of inputs and features are the same, so that `Y Phi^T` and `Y H^T`
  have the same leading left singular vectors, which the two updates learn first.
- *control* teacher: `b` is `a` reversed. The largest latents of features are the smallest ones of inputs.

Reported during training, naive and with the orthogonality constraint of section 5.2: the principal cosines between the
column spaces of the two updates (which the constraint makes zero), and on held-out inputs the mean absolute cosine
between the two activation shifts `W phi(x)` and `S (x + phi(x))`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..tuners.joint_steering.projection import project_

D, RANK, SAMPLES, STEPS, REPORT = 32, 4, 2048, 400, (10, 50, 100, 200, 400)


def teacher(coinciding: bool, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Features, residual streams and targets (2 * SAMPLES, D) in float64; the second half is held out."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, target = torch.linalg.qr(normal(D, D)).Q, torch.linalg.qr(normal(D, D)).Q
    latents, scale = normal(2 * SAMPLES, D), 1 / (1 + torch.arange(D, dtype=torch.float64))
    features = 1.6 * (scale if coinciding else scale.flip(0)) * torch.tanh(latents) @ basis.T
    residual = 3 * scale * latents @ basis.T + features
    y = (features + residual) @ target.T + 0.05 * normal(2 * SAMPLES, D)
    return features, residual, y


def train(coinciding: bool, orthogonal: bool, seed: int, learning_rate: float = 0.02) -> list[dict[str, float]]:
    """Gradient descent. Returns a row for each step in `REPORT`."""
    generator = torch.Generator().manual_seed(seed)
    features, residual, y = teacher(coinciding, generator)
    A, Dn = (torch.randn(RANK, D, generator=generator, dtype=torch.float64) / D**0.5 for _ in range(2))
    B, U = (torch.zeros(D, RANK, dtype=torch.float64) for _ in range(2))
    for matrix in (A, B, Dn, U):
        matrix.requires_grad_()
    rows = []
    for step in range(1, STEPS + 1):
        shifts = (features[:SAMPLES] @ A.T @ B.T, residual[:SAMPLES] @ Dn.T @ U.T)
        loss = (y[:SAMPLES] - shifts[0] - shifts[1]).square().sum(1).mean()
        gradients = torch.autograd.grad(loss, (A, B, Dn, U))
        with torch.no_grad():
            for matrix, gradient in zip((A, B, Dn, U), gradients, strict=True):
                matrix -= learning_rate * gradient
        if orthogonal:
            project_([([B], U)])
        if step in REPORT:
            held_out = (features[SAMPLES:] @ A.T @ B.T, residual[SAMPLES:] @ Dn.T @ U.T)
            test_loss = (y[SAMPLES:] - held_out[0] - held_out[1]).square().sum(1).mean()
            rows.append({"step": step, "test_loss": test_loss.item(), **alignment(B, U, held_out)})
    return rows


@torch.no_grad()
def alignment(B: torch.Tensor, U: torch.Tensor, shifts: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    cosines = torch.linalg.svdvals(torch.linalg.qr(B).Q.T @ torch.linalg.qr(U).Q)
    shift = torch.cosine_similarity(*shifts, dim=1).abs().mean()
    return {"largest_cosine": cosines[0].item(), "mean_cosine": cosines.mean().item(), "shift_cosine": shift.item()}


def proposition_4_2(seeds: Iterable[int]) -> list[dict]:
    """Mean and standard deviation over seeds for every teacher, training and step.

    Args:
        seeds (`Iterable[int]`): Seeds of the teachers and of the initial weights, at least two.

    Returns:
        `list[dict]`: For each combination `teacher` (`"coinciding"` or `"control"`), `training` (`"naive"` or
        `"constrained"`) and `step`, and pairs of mean and standard deviation: `largest_cosine`, `mean_cosine`,
        `shift_cosine` and `test_loss`.
    """
    cases = [(coinciding, orthogonal) for coinciding in (True, False) for orthogonal in (False, True)]
    runs: dict = {case: [] for case in cases}
    for seed in seeds:
        for case in cases:
            runs[case].append(train(*case, seed))
    return [
        {
            "teacher": "coinciding" if coinciding else "control",
            "training": "constrained" if orthogonal else "naive",
            "step": rows[0]["step"],
            **{name: _mean_and_std([row[name] for row in rows]) for name in rows[0] if name != "step"},
        }
        for (coinciding, orthogonal), of_seeds in runs.items()
        for rows in zip(*of_seeds, strict=True)
    ]


def _mean_and_std(values: list[float]) -> list[float]:
    found = torch.tensor(values)
    return [found.mean().item(), found.std().item()]
