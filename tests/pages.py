"""The pages of the documentation, what they tell a reader to paste, and where their links lead."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from checkout import CHECKOUT

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FOLDERS = ("trl_steer", "integrations", "eval")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or a cell of a notebook.

    Args:
        page (`str`): Path of the page in the checkout.
        line (`int`): Where it begins; of a notebook, the number of the cell.
        heading (`str`): The heading that it stands under.
        language (`str`): As the fence names it.
        code (`str`): What a reader pastes.
    """

    page: str
    line: int
    heading: str
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """All pages and notebooks for users, README first."""
    found = [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*.md")]
    notebooks = [path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*.ipynb")]
    return ["README.md", *sorted(str(path.relative_to(CHECKOUT)) for path in (*found, *notebooks))]


def text_of(page: str) -> str:
    """The page as Markdown."""
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    if not page.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    fence = {"markdown": "{}\n", "code": "```python\n{}\n```\n"}
    return "\n".join(fence[cell["cell_type"]].format("".join(cell["source"])) for cell in cells)


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text, found = text_of(page), []
    for fence in FENCE.finditer(text):
        indent, language, code = fence.groups()
        before = FENCE.sub("", text[: fence.start()])
        heading = (HEADING.findall(before) or [""])[-1]
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        found.append(Block(page, text.count("\n", 0, fence.start()) + 2, heading, language, "\n".join(lines) + "\n"))
    return found


def prose(page: str) -> str:
    return FENCE.sub("", text_of(page))


def links(page: str) -> list[str]:
    """Where the page leads to inside the checkout: paths from its root, with what follows a `#`."""
    found = [target for target in LINK.findall(prose(page)) if "://" not in target]
    joined = [page + target if target.startswith("#") else str(Path(page).parent / target) for target in found]
    return [str(Path(CHECKOUT, path).resolve().relative_to(CHECKOUT.resolve())) for path in joined]


def anchors(page: str) -> set[str]:
    """What a `#` can name on a page, as GitHub makes it of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(page))}
