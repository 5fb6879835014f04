"""The classes of tasks: prompts, completions, splits, and the extraction of answers from generated text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_steer.tasks import sources
from trl_steer.tasks.splits import Splitter, disjoint

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset to train on, with prompts and completions.

    Args:
        name (`str`): Name of the task.
        source (`Mapping[str, Any]`): Arguments of `read`: `dataset_path` and `config` for a dataset on the Hub. They
            can be overridden, see [`trl_steer.tasks.sources`].
        prompt (`Callable[[Row], str]`): The prompt of a row. It ends in a newline.
        completion (`Callable[[Row], str]`): The completion of a row.
        splits (`Mapping[str, Splitter]`): Functions from the published splits to train, validation and test, by name.
        key (`tuple[str, ...]`): Columns that are equal for duplicate rows.
        read (`Callable[..., Mapping[str, Dataset]]`): Loads the published splits.
    """

    name: str
    source: Mapping[str, Any]
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]
    splits: Mapping[str, Splitter]
    key: tuple[str, ...]
    read: Callable[..., Mapping[str, "Dataset"]] = sources.read_hub

    def rows(self, splits: str = "default", **source: Any) -> dict[str, "Dataset"]:
        """The published rows, split into `train`, `validation` and `test`.

        A split whose rows are missing from the source is left out. In the default splits, rows of `validation` that
        are also in `test`, and rows of `train` that are also in one of them, are removed.

        Raises:
            ValueError: The task does not have these splits, or these entries of `source`.
        """
        if splits not in self.splits:
            raise ValueError(f"Task {self.name!r} has no splits {splits!r}. Choose one of: {', '.join(self.splits)}.")
        parts = self.splits[splits](self.read(**sources.resolve(self.name, self.source, source)))
        return disjoint(parts, self.key) if splits == "default" else dict(parts)

    def example(self, row: Row, conversational: bool = False) -> dict[str, Any]:
        """A row in TRL's prompt-completion format, standard or conversational."""
        prompt, completion = self.prompt(row), self.completion(row)
        if not conversational:
            return {"prompt": prompt, "completion": completion}
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A task with correct answers, for training and for the lm-eval tasks `steer_<name>`.

    `strict`, `flexible` and `steerling` are three ways to extract the answer from generated text. Each is a
    `Callable[[str], str | None]`, and returns `None` if it finds no answer.

    Args:
        answer (`Callable[[Row], str]`): The correct answer of a row, in the form in which answers are extracted.
        strict: Only accepts the format of the completions.
        flexible: Also accepts other formats, and an answer without a mark such as "Answer:".
        steerling: As in the code of the paper's authors.
        choices (`Callable[[Row], list[str]]`, *optional*): For multiple choice, the completion of each option up to
            the end of its name, in the order of the options.
        choice_names (`Callable[[Row], list[str]]`, *optional*): Names of the options, in the form of `answer`.
    """

    answer: Callable[[Row], str]
    strict: Callable[[str], str | None]
    flexible: Callable[[str], str | None]
    steerling: Callable[[str], str | None]
    choices: Callable[[Row], list[str]] | None = None
    choice_names: Callable[[Row], list[str]] | None = None

    def document(self, row: Row) -> dict[str, Any]:
        """A row as a document of the lm-eval tasks: the example, its answer and, for multiple choice, its options."""
        document = {**self.example(row), "answer": self.answer(row)}
        if self.choices is not None and self.choice_names is not None:
            document |= {"choices": self.choices(row), "label": self.choice_names(row).index(document["answer"])}
        return document
