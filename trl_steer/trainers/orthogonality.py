"""The orthogonality constraint in a training loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..tuners.joint_steering.constraint import OrthogonalityConstraint
from ..tuners.joint_steering.projection import ProjectionReport


class OrthogonalityCallback(TrainerCallback):
    """
    Projects after every `every` optimizer steps and after the last one.

    Args:
        constraint ([`OrthogonalityConstraint`]): The constraint.
        every (`int`, defaults to `1`): Optimizer steps between projections.

    Attributes:
        report (`dict[str, float]`): What projecting did since the last time it was taken with [`take_report`].
    """

    def __init__(self, constraint: OrthogonalityConstraint, every: int = 1):
        self.constraint, self.every = constraint, every
        self.report: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs: Any):
        self.constraint.log_bound()

    def on_pre_optimizer_step(self, args, state, control, **kwargs: Any):
        self.constraint.project_gradients()

    def on_optimizer_step(self, args, state, control, **kwargs: Any):
        if (state.global_step + 1) % self.every == 0:
            self.project()

    def on_train_end(self, args, state, control, **kwargs: Any):
        self.project()

    def project(self) -> None:
        self._note(self.constraint.project())

    def take_report(self) -> dict[str, float]:
        """The report, which starts anew. Without a projection since the last time, what one would do now."""
        if not self.report:
            self._note(self.constraint.measure())
        report, self.report = self.report, {}
        return report

    def _note(self, done: ProjectionReport) -> None:
        self.report = {
            "steering_overlap": max(self.report.get("steering_overlap", 0.0), done.max_overlap),
            "steering_norm_kept": min(self.report.get("steering_norm_kept", 1.0), done.kept_norm),
        }
