"""What a task is: how a row becomes a prompt and a completion, how an answer is read, which rows are for what."""

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
    """Rows to train on, with the prompt and the completion of each.

    Args:
        name (`str`): The task's name.
        source (`Mapping[str, Any]`): What `read` is called with: `dataset_path` and `config` for a data set of the
            Hub. Each entry can be overridden, see [`trl_steer.tasks.sources`].
        prompt (`Callable[[Row], str]`): The prompt for a row. It ends in a line break, where the completion begins.
        completion (`Callable[[Row], str]`): What a model is trained to write.
        splits (`Mapping[str, Splitter]`): By name, how published splits become train, validation and test.
        key (`tuple[str, ...]`): The columns by which two rows count as the same example.
        read (`Callable[..., Mapping[str, Dataset]]`): Gives the published splits for `source`.
    """

    name: str
    source: Mapping[str, Any]
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]
    splits: Mapping[str, Splitter]
    key: tuple[str, ...]
    read: Callable[..., Mapping[str, "Dataset"]] = sources.read_hub

    def rows(self, splits: str = "default", **source: Any) -> dict[str, "Dataset"]:
        """The rows as they are published, divided into `train`, `validation` and `test`.

        A split that needs rows which a copy lacks is left out. In the default splits no row of `validation` is in
        `test`, and none of `train` in either; other splits are left as their authors made them.

        Raises:
            ValueError: for splits, or entries of `source`, that the task does not have.
        """
        if splits not in self.splits:
            raise ValueError(
                f"Task {self.name!r} has no splits named {splits!r}. Choose one of: {', '.join(self.splits)}."
            )
        parts = self.splits[splits](self.read(**sources.resolve(self.name, self.source, source)))
        return disjoint(parts, self.key) if splits == "default" else dict(parts)

    def example(self, row: Row, conversational: bool = False) -> dict[str, Any]:
        """A row as TRL's prompt-completion example: two strings, or two lists of one chat message each."""
        prompt, completion = self.prompt(row), self.completion(row)
        if not conversational:
            return {"prompt": prompt, "completion": completion}
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }


@dataclass(frozen=True, kw_only=True)
class Benchmark(Task):
    """A task with right answers. Training data and the lm-eval tasks `steer_<name>` are both made from this object.

    `strict`, `flexible` and `steerling` are three readings of the same generated text, each
    `Callable[[str], str | None]`: the answer that the text gives, None where it gives none.

    Args:
        answer (`Callable[[Row], str]`): The right answer of a row, spelled as the readers spell it.
        strict: Knows the mark that completions are trained with and nothing else.
        flexible: Also knows other ways to announce an answer, and takes a bare one where there is no announcement.
        steerling: Reads as the code does that the paper's authors released.
        choices (`Callable[[Row], list[str]]`, *optional*): For multiple choice, the completion of each option up to
            where its name ends, in the order of the options.
        choice_names (`Callable[[Row], list[str]]`, *optional*): The options' names, spelled as `answer` spells them.
    """

    answer: Callable[[Row], str]
    strict: Callable[[str], str | None]
    flexible: Callable[[str], str | None]
    steerling: Callable[[str], str | None]
    choices: Callable[[Row], list[str]] | None = None
    choice_names: Callable[[Row], list[str]] | None = None

    def document(self, row: Row) -> dict[str, Any]:
        """A row as the lm-eval tasks see it: the example with its answer and, for multiple choice, its options."""
        document = {**self.example(row), "answer": self.answer(row)}
        if self.choices is not None and self.choice_names is not None:
            document |= {"choices": self.choices(row), "label": self.choice_names(row).index(document["answer"])}
        return document
