r"""What all answer readers share: one plain form of generated text, and how an announced answer begins.

Models write the same answer in many dresses: full-width letters, Markdown bold, `\boxed{}`. These are taken off here,
once, so that each task's reader is left with the one question that is its own.
"""

import re
import unicodedata

_VULGAR_FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")
_FORMATTING = re.compile(r"`|\$|\\[()\[\],;! ]")
_STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\f?boxed\s*\{([^{}]*)\}")

# "Answer: ", "answer is ", "ANSWER - ", "answer is: ": what stands between the word and the answer itself.
ANNOUNCED = r"(?i:\banswer\b)(?:\s*(?i:is|(?:would|should|must|will) be)\b)?[\s:=*\"'>\-\u2010-\u2015]*"

# A capital letter from A to E that stands for an option: not within a word, not the article of "A train leaves".
CAPITAL = r"[A-E](?![\w'\u2019])(?!(?<=A)\s+(?!(?:is|was|because|since|as|and|or)\b)[a-z])"
# A small one, only where a mark or the end of the line follows.
SMALL = r"[a-e](?=\s*(?:[).,:;\]}]|$))"


def plain(text: str) -> str:
    r"""The text without typography: compatibility forms replaced (NFKC), Markdown and LaTeX marks removed.

    `\boxed{x}`, by which many models announce a final answer, becomes `Answer: x`. Line breaks stay.
    """
    # NFKC turns a half behind a digit into "21/2"; the space keeps the two numbers apart.
    text = unicodedata.normalize("NFKC", _VULGAR_FRACTION.sub(" ", text))
    text = text.replace("{,}", ",").replace("\u2212", "-")
    text = _STYLE.sub(r"\1", text)
    text = _BOXED.sub(r"Answer: \1 ", text)
    return _FORMATTING.sub("", text.replace("**", " ").replace("__", " "))
