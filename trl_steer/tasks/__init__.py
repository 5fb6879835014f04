"""The tasks, each defined once for training and evaluation. Importing this does not import `datasets`."""

from trl_steer.tasks.base import Benchmark, Task
from trl_steer.tasks.registry import BENCHMARKS, SIX, TASKS, get_task, load_task

__all__ = ["BENCHMARKS", "SIX", "TASKS", "Benchmark", "Task", "get_task", "load_task"]
