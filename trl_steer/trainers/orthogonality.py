"""The orthogonality constraint in a training loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..tuners.joint_steering.constraint import OrthogonalityConstraint
from ..tuners.joint_steering.projection import ProjectionReport


class OrthogonalityCallback(TrainerCallback):
    """
    Projects the weights every so many optimizer steps, and the gradients of each step.

    Args:
        constraint ([`OrthogonalityConstraint`]): The constraint.
        every (`int`, defaults to `1`): Optimizer steps between projections.
        before_step (`bool`, defaults to `False`): Project before a step, the first one included, and not after it.
        at_end (`bool`, defaults to `True`): Project after the last step, whatever `every` is.
        gradients (`bool`, defaults to `True`):
            Project the gradients too, so that the optimizer's momentum does not keep pushing out.

    Attributes:
        report (`dict[str, float]`): What projecting did since the last time it was taken with [`take_report`].
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
