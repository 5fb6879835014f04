r"""What all answer readers share: one plain form of generated text, and where in it an answer is announced.

Models write the same answer in many dresses: full-width letters, Markdown bold, `\boxed{}`, tags. These are taken off
here, once, so that each task's reader is left with the one question that is its own.

What announces an answer has two ranks. The first is the mark that completions are trained with, `Answer:`; what
follows it is the answer whatever else the text says. Only a text without it is searched for sentences, "the answer
is ...": in the middle of a reasoning these may weigh an answer, or reject it.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

_VULGAR_FRACTION = re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])")
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_SUBSCRIPT = re.compile("[\u2080-\u2089]+")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]|<\\|[^<>|]*\\|>|</s>")
_QUOTES = str.maketrans({**dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'), **dict.fromkeys("\u2018\u2019", "'")})
_SIGN = re.compile(r"(?<![\w)\]%])[\u2012\u2013\u2212](?=[$\u20ac\u00a3\u00a5\u20b9]?\.?\d)")
_ANSWER_TAG = re.compile(r"<\s*answer\s*>", re.IGNORECASE)
_TAGS = re.compile(r"<([A-Za-z]\w*)>(.*?)</\1>", re.DOTALL | re.IGNORECASE)
_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|emph|math(?:rm|bf|it|sf))\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\f?boxed\s*\{([^{}]*)\}")
_FORMATTING = re.compile(r"`|\\[()\[\],;! ]")
# Asterisks and underscores around words, not those of a product or inside of a name.
_EMPHASIS = re.compile(r"\*\*|__|(?<!\w)[*_]+(?=\S)|(?<=\S)[*_]+(?!\w)")
_MATHS = re.compile(r"\$([^\s$]+)\$|\$(?!\s?\.?\d)")

# The mark of the completions, also in the plural, or as a key of JSON.
MARK = r"(?i:\banswers?\b)[\"']?\s*:"
# "The answer is", "the answer to the question is", "answer = ", "Correct answer - ", "## Answer" above its own line.
SENTENCE = (
    r"(?i:\banswer\b)\s*(?:"
    r"(?i:(?:(?:to|for)\s[^.:?\n\"]*?\s)?(?:is|(?:would|could|should|must|will|can) be))\b\s*:?"
    r"|[=\-\u2010-\u2015\u2190-\u21ff\u2794-\u27be]|\.{3}|\n)"
)
# Between the announcement and the answer: quotation marks, brackets, arrows, line breaks, but no sign of a number.
FILLER = r"[^\w$.+\-]*(?:[\-.]+\s+)?[^\w$.+\-]*"
# "option", "the correct choice is", "letter:"
CALLED = (
    r"(?:(?i:(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:option|choice|letter|answer)\b"
    r"(?:\s+is\b)?(?:\s*(?:number|no\.))?)[\s:#\"'(\[]*)?"
)

# Words behind an answer. Others make a letter an article, and a number a quantity.
AFTER = r"(?:is|was|because|since|as|and|or)\b"
IS_CORRECT = r"is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
# A capital letter from A to E that stands for an option: not within a word, an abbreviation or a formula, not the
# article of "A train leaves".
CAPITAL = rf"[A-E](?![\w\-+=]|'\w|\.\w\.)(?!(?<=A)[^\S\n]+(?!{AFTER})[a-z])"
# A small one, only where a mark, a reason or the end of the line follows.
SMALL = (
    r"[a-e](?!\.\w\.)"
    rf"(?=\s*(?:[).,:;!\]}}\"'>]|$|-\s|(?:because|since|as)\b|{IS_CORRECT}|(?:and|or)\s+(?:not\s+)?[a-e]\b))"
)


def plain(text: str) -> str:
    r"""The text without typography: compatibility forms replaced (NFKC), marks of Markdown, LaTeX and HTML removed.

    `\boxed{x}` and `<answer>x</answer>`, by which many models announce a final answer, become `Answer: x`. Exponents
    are written `^2`. Line breaks stay.
    """
    text = _SUPERSCRIPT.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]).replace("\u2212", "-"), text)
    text = _SUBSCRIPT.sub(lambda found: "_" + unicodedata.normalize("NFKC", found[0]), text)
    # NFKC turns a half behind a digit into "21/2"; the space keeps the two numbers apart.
    text = unicodedata.normalize("NFKC", _VULGAR_FRACTION.sub(" ", text))
    text = _INVISIBLE.sub("", text).translate(_QUOTES)
    text = _SIGN.sub("-", text.replace("{,}", ","))
    text = _ANSWER_TAG.sub(" Answer: ", text)
    for _ in range(2):  # one within another
        text = _TAGS.sub(r"\2", text)
        text = _STYLE.sub(r"\1", text)
    text = _BOXED.sub(r"Answer: \1\n", text)
    text = _EMPHASIS.sub(lambda found: " " if len(found[0]) > 1 else "", _FORMATTING.sub("", text))
    return _MATHS.sub(lambda found: found[1] or "", text)


def announced(answer: str, between: str = FILLER) -> tuple[re.Pattern[str], ...]:
    """Patterns for `answer` right behind an announcement, by rank."""
    return tuple(re.compile(f"{start}{between}{answer}", re.MULTILINE) for start in (MARK, SENTENCE))


def by_rank(patterns: Sequence[re.Pattern[str]], text: str) -> Iterator[list[str]]:
    """For each rank that has any, what the groups of its matches hold, in the order of the text."""
    for pattern in patterns:
        found = ["".join(group or "" for group in match.groups()) for match in pattern.finditer(text)]
        if found:
            yield found
