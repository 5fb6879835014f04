"""The functions in the YAML files in this folder. They are defined in `trl_steer.tasks`, like the prompts."""

from functools import partial

from trl_steer.tasks.lm_eval import documents, no_answer, read_answers

strict, flexible, steerling = (partial(read_answers, reader) for reader in ("strict", "flexible", "steerling"))

__all__ = ["documents", "flexible", "no_answer", "steerling", "strict"]
