"""Tables, and how they are written in Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..analysis.report import table as markdown_table

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": "$<$",
    ">": "$>$",
    "Δ": r"$\Delta$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "*": "$^*$",
}
_SIGN = re.compile(r"(?<![^\s(])([+-])(?=[\d.])")
_MARKDOWN = re.compile(r"([\\|*_`<>\[\]])")


class Bold(str):
    """A cell in bold type."""


@dataclass(frozen=True)
class Table:
    """
    A table of text.

    Attributes:
        name (`str`): Short name, for references.
        caption (`str`): What it shows.
        header (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[str]]`): The cells. Of a group of rows, only the first one names it in its first cell.
        left (`int`): How many of the first columns are aligned on the left.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 2

    def markdown(self) -> str:
        cells = [[markdown(cell) for cell in row] for row in self.rows]
        return markdown_table([markdown(cell) for cell in self.header], cells, self.left)

    def latex(self) -> str:
        """A `table` with the rules of booktabs, and one above each group. graphicx shrinks it if it is too wide."""
        columns = "l" * self.left + "r" * (len(self.header) - self.left)
        lines = [
            r"\begin{table}[t]",
            r"\centering\small",
            rf"\caption{{{latex(self.caption)}}}",
            rf"\label{{tab:{self.name}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rf"{' & '.join(map(latex, self.header))} \\",
        ]
        for number, row in enumerate(self.rows):
            lines += [r"\midrule"] if number == 0 or row[0] else []
            lines.append(rf"{' & '.join(map(latex, row))} \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"])


def latex(text: str) -> str:
    """Text for LaTeX, in which the signs of numbers are mathematics."""
    escaped = _SIGN.sub(r"$\1$", "".join(_LATEX.get(character, character) for character in text))
    return rf"\textbf{{{escaped}}}" if isinstance(text, Bold) else escaped


def markdown(text: str) -> str:
    """Text for Markdown, in which nothing is markup."""
    escaped = _MARKDOWN.sub(r"\\\1", text)
    return f"**{escaped}**" if isinstance(text, Bold) else escaped
