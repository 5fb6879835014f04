"""The tasks: one definition of each for training and for evaluation. Importing this loads nothing heavy."""

from trl_steer.tasks.base import Benchmark, Task
from trl_steer.tasks.registry import BENCHMARKS, SIX, TASKS, get_task, load_task

__all__ = ["BENCHMARKS", "SIX", "TASKS", "Benchmark", "Task", "get_task", "load_task"]
