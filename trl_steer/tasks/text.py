r"""Patterns for the extraction of answers.

`strict` only accepts the mark in the completions, `Answer: X`. `flexible` also accepts the marks of models that were
not trained on these: `The answer is X`, `**Answer:** (X)`, `\boxed{X}`.
"""

import re

# A mark before an answer, including brackets and Markdown, but not the sign of a number.
MARK = r"(?:(?i:\banswer[*_]*\s*(?:is\b|:))|\\boxed\{(?:\\text\{)?)[^\w.\-]*"
# A separate capital letter. In "A plant", the letter is an article; in "A is right", it is an answer.
LETTER = r"(?<![\w'])(?:[B-E]|A(?! (?!is\b)[a-z]))(?![\w'])"


def last(pattern: str, text: str) -> str | None:
    """The group of the last match of a pattern, or `None`."""
    found = re.findall(pattern, text)
    return found[-1] if found else None


def first(pattern: str, text: str) -> str | None:
    """The group of the first match of a pattern, or `None`."""
    found = re.search(pattern, text)
    return found[1] if found else None
