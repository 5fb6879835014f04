"""The functions that the YAML files beside this one name. All of them, and all prompts, live in `trl_steer.tasks`."""

from trl_steer.tasks.harness import documents, no_answer, read_answers

__all__ = ["documents", "no_answer", "read_answers"]
