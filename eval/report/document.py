"""The files of a report: its text with tables and pictures, the tables for LaTeX, and all runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import comparisons, pictures, published, results, runs_csv
from .records import Cell, Record
from .summary import Summary
from .tables import Table, markdown

REPORT, LATEX, RUNS = "report.md", "tables.tex", "runs.csv"
TESTS = (
    "Both sides answer the same examples with the same seeds: those that both have and in which not both diverged. A "
    f"difference in bold is beyond noise: p is below {comparisons.LEVEL} after Holm's correction, and the interval "
    "over seeds does not contain 0. p is that of the exact sign-flip test over examples, two-sided; with one seed, "
    "this is the exact McNemar test. The correction is over all comparisons with the same reference. Intervals: over "
    "examples, a paired bootstrap with these seeds; over seeds, Student's t with these examples."
)
RATES = (
    "Of several rates, that with the best validation accuracy. "
    f"{results.LOWEST} or {results.HIGHEST}: the lowest or the highest one of its grid; a better one may be outside."
)
PARAMETER_PICTURE = (
    "Error bars: standard deviation over seeds of the average over tasks. Points with about as many parameters are "
    "moved apart. Rows without an average are left out."
)
RATE_PICTURES = (
    "Error bars: standard error over examples with one seed, standard deviation with several. Crosses: a run "
    "diverged. Rings: the rate of the test stage."
)
PAPER = (
    f"Accuracies are those of the paper, and differences are recomputed from them. {published.WRONG}: the printed "
    "difference does not follow from the printed accuracies, and rounding does not explain it; it stands in "
    "parentheses in the paper's tables. In Table 4: not the accuracy of the same method in Table 1."
)


class Section(NamedTuple):
    """
    A section of the report.

    Attributes:
        heading (`str`): Its heading.
        text (`str`): Markdown below the heading.
        tables (`Sequence[Table]`): Tables, with their captions.
        pictures (`Sequence[str]`): Names of the files of pictures.
        note (`str`): Text below the pictures.
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[str] = ()
    note: str = ""

    def markdown(self) -> str:
        tables = [part for table in self.tables for part in (markdown(table.caption), table.markdown())]
        shown = [f"![{self.heading}]({name})" for name in self.pictures]
        return "\n\n".join(part for part in (f"## {self.heading}", self.text, *tables, *shown, self.note) if part)

    def latex(self) -> list[str]:
        """The tables, below their explanation as a comment."""
        comment = [f"% {self.text}"] if self.text and self.tables else []
        return [*comment, *(table.latex() for table in self.tables)]


def is_ours(name: str) -> bool:
    """Whether a file in the folder of a report is part of it."""
    return name in (REPORT, LATEX, RUNS) or pictures.is_ours(name)


def files(record: Record, paper: bool, references: Sequence[str] = ()) -> dict[str, bytes]:
    """The files of the report by name. The same record gives the same files, but for the last columns of the CSV file.

    Args:
        record ([`Record`]): The study.
        paper (`bool`): Whether to add the paper's numbers.
        references (`Sequence[str]`, *optional*): See [`Summary`].

    Raises:
        RunError: Two runs to be compared were evaluated on different examples.
        ValueError: The study does not have one of `references`.
    """
    summary = Summary(record, references)
    drawn = pictures.pictures(summary)
    sections = list(_sections(summary, list(drawn), paper))
    tables = [part for section in sections for part in section.latex()]
    texts = {
        REPORT: "\n\n".join(
            [f"# {markdown(record.title)}", _introduction(record), *(part.markdown() for part in sections)]
        ),
        LATEX: "\n\n".join([r"% Needs \usepackage{booktabs,graphicx}.", *tables]),
        RUNS: runs_csv.write(record).rstrip("\n"),
    }
    return {name: f"{text}\n".encode() for name, text in texts.items()} | drawn


def _introduction(record: Record) -> str:
    states = [cell.state for cell in record.cells]
    counted = {state: states.count(state) for state in ("finished", "diverged", "failed", "missing")}
    said = ", ".join(f"{number} {state}" for state, number in counted.items() if number)
    guessed = [f"- {markdown(text)}" for text in record.guessed]
    return "\n".join(
        [
            f"{len(states)} runs: {said}. All of them are in [{RUNS}]({RUNS}).",
            *(["", "Assumed:", "", *guessed] if guessed else []),
        ]
    )


def _sections(summary: Summary, drawn: Sequence[str], paper: bool) -> Iterator[Section]:
    record = summary.record
    if not record.tasks:
        yield Section("Results", f"No task of this study is evaluated. [{RUNS}]({RUNS}) has its runs.")
        return

    def named(start: str) -> list[str]:
        return [name for name in drawn if name.startswith(start)]

    of_parameters = PARAMETER_PICTURE if named(pictures.PARAMETERS) else ""
    yield Section("Accuracy", "", [results.accuracy_table(summary)], named(pictures.PARAMETERS), of_parameters)
    yield Section("Standard deviations", tables=[results.deviation_table(summary)])
    if named(pictures.RANK):
        note = "Error bars: standard deviation over seeds."
        yield Section("Rank and nonlinearity", pictures=named(pictures.RANK), note=note)
    of_rates = named(pictures.RATES)
    yield Section("Learning rates", RATES, [results.rate_table(summary)], of_rates, RATE_PICTURES if of_rates else "")
    tests = [results.comparison_table(*item) for item in comparisons.compare(summary).items() if item[1]]
    if tests:
        yield Section("Paired tests", TESTS, tests)
    unusual = [line for cell in record.cells for line in _unusual(cell)]
    if unusual:
        yield Section("Collapsed, diverged and failed runs", "\n".join(unusual))
    if paper:
        yield Section("The paper", PAPER, published.tables(summary))


def _unusual(cell: Cell) -> Iterator[str]:
    rate = "" if cell.rate is None else f", rate {results.rate(cell.rate)}"
    name = f"{cell.model}, {cell.task}, {cell.row}{rate}, seed {cell.seed} ({cell.stage})"
    if cell.state in ("diverged", "failed"):
        yield f"- {cell.state}: {markdown(f'{name}: {cell.reason}')}"
    elif cell.collapsed and cell.stage == "test":
        most_frequent = f"{results.percent(cell.majority)} for the most frequent answer"
        yield f"- collapsed: {markdown(name)}: {results.percent(cell.accuracy)}, and {most_frequent}"
