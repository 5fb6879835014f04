"""The benchmarks: one definition of each for training and for evaluation. Importing this loads nothing heavy."""

from trl_steer.tasks.base import Task
from trl_steer.tasks.registry import SIX, TASKS, get_task, load_task

__all__ = ["SIX", "TASKS", "Task", "get_task", "load_task"]
