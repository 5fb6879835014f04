"""The trainer callback of the orthogonality constraint."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..tuners.joint_steering.constraint import OrthogonalityConstraint
from ..tuners.joint_steering.projection import ProjectionReport


class OrthogonalityCallback(TrainerCallback):
    """
    Projects the weights regularly during training, and the gradients before each optimizer step.

    Args:
        constraint ([`OrthogonalityConstraint`]): The constraint.
        every (`int`, defaults to `1`): Number of optimizer steps between projections.
        before_step (`bool`, defaults to `False`): Whether to project before a step, starting with the first one,
            rather than after it.
        at_end (`bool`, defaults to `True`): Whether to project after the last step, for any `every`.
        gradients (`bool`, defaults to `True`):
            Whether to project the gradients too, so that the optimizer's momentum stays in the orthogonal complement.

    Attributes:
        report (`dict[str, float]`): The effect of the projections since the last call of [`pop_report`].
    """

    def __init__(
        self,
        constraint: OrthogonalityConstraint,
        every: int = 1,
        before_step: bool = False,
        at_end: bool = True,
        gradients: bool = True,
    ):
        self.constraint, self.every = constraint, every
        self.before_step, self.at_end, self.gradients = before_step, at_end, gradients
        self.report: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs: Any):
        self.constraint.log_bound()

    def on_pre_optimizer_step(self, args, state, control, **kwargs: Any):
        if self.gradients:
            self.constraint.project_gradients()
        if self.before_step and state.global_step % self.every == 0:
            self.project()

    def on_optimizer_step(self, args, state, control, **kwargs: Any):
        if not self.before_step and (state.global_step + 1) % self.every == 0:
            self.project()

    def on_train_end(self, args, state, control, **kwargs: Any):
        if self.at_end:
            self.project()

    def project(self) -> None:
        self._update_report(self.constraint.project())

    def pop_report(self) -> dict[str, float]:
        """Returns and clears the report. If there was no projection, the report is what a projection would do now."""
        if not self.report:
            self._update_report(self.constraint.measure())
        report, self.report = self.report, {}
        return report

    def _update_report(self, done: ProjectionReport) -> None:
        self.report = {
            "steering_overlap": max(self.report.get("steering_overlap", 0.0), done.max_overlap),
            "steering_norm_kept": min(self.report.get("steering_norm_kept", 1.0), done.kept_norm),
        }
