r"""What the readers of answers share.

`strict` knows nothing but the mark that completions are trained with, `Answer: X`. `flexible` knows the ways in which
models that were not trained on it announce an answer: `The answer is X`, `**Answer:** (X)`, `\boxed{X}`.
"""

import re

# Stands in front of a task's own pattern, with what may lie between: brackets and Markdown, but no sign of a number.
MARK = r"(?:(?i:\banswer[*_]*\s*(?:is\b|:))|\\boxed\{(?:\\text\{)?)[^\w.\-]*"
# A capital that stands alone; "A plant" has an article, "A is right" an answer.
LETTER = r"(?<![\w'])(?:[B-E]|A(?! (?!is\b)[a-z]))(?![\w'])"


def last(pattern: str, text: str) -> str | None:
    """What the pattern's one group holds in its last match, None where there is none."""
    found = re.findall(pattern, text)
    return found[-1] if found else None


def first(pattern: str, text: str) -> str | None:
    """What the pattern's one group holds in its first match, None where there is none."""
    found = re.search(pattern, text)
    return found[1] if found else None
