"""The functions that the YAML files beside this one name. All of them, and all prompts, live in `trl_steer.tasks`."""

from functools import partial

from trl_steer.tasks.harness import documents, no_answer, read_answers

strict, flexible, steerling = (partial(read_answers, reader) for reader in ("strict", "flexible", "steerling"))

__all__ = ["documents", "flexible", "no_answer", "steerling", "strict"]
