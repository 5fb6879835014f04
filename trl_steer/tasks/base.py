"""What a benchmark is: how a row becomes a prompt and a completion, how an answer is read, which rows are for what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_steer.tasks import sources
from trl_steer.tasks.splits import Splitter, disjoint

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One benchmark. Training data and the lm-eval tasks are both made from this object, and from nothing else.

    Args:
        name (`str`): The task's name here; the lm-eval tasks are `steer_<name>` and its variants.
        source (`Mapping[str, Any]`): What `read` is called with: `dataset_path` and `config` for a data set of the
            Hub. Each entry can be overridden, see [`trl_steer.tasks.sources`].
        prompt (`Callable[[Row], str]`): The prompt for a row. It ends in a line break, where the completion begins.
        completion (`Callable[[Row], str]`): What a model is trained to write; it ends in the answer.
        answer (`Callable[[Row], str]`): The right answer of a row, spelled as `extract` spells it.
        extract (`Callable[[str], str | None]`): The answer that generated text gives, None where it gives none.
        splits (`Mapping[str, Splitter]`): By name, how published splits become train, validation and test.
        key (`tuple[str, ...]`): The columns by which two rows count as the same example.
        choices (`Callable[[Row], list[str]]`, *optional*): For multiple choice, the completion of each option up to
            where its name ends, in the order of the options.
        choice_names (`Callable[[Row], list[str]]`, *optional*): The options' names, spelled as `answer` spells them.
        read (`Callable[..., Mapping[str, Dataset]]`): Gives the published splits for `source`.
    """

    name: str
    source: Mapping[str, Any]
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]
    answer: Callable[[Row], str]
    extract: Callable[[str], str | None]
    splits: Mapping[str, Splitter]
    key: tuple[str, ...]
    choices: Callable[[Row], list[str]] | None = None
    choice_names: Callable[[Row], list[str]] | None = None
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
                f"task {self.name!r} has no splits named {splits!r}. Choose one of: {', '.join(self.splits)}."
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

    def document(self, row: Row) -> dict[str, Any]:
        """A row as the lm-eval tasks see it: the example with its answer and, for multiple choice, its options."""
        document = {**self.example(row), "answer": self.answer(row)}
        if self.choices is not None and self.choice_names is not None:
            document |= {"choices": self.choices(row), "label": self.choice_names(row).index(document["answer"])}
        return document
