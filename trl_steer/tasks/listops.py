"""ListOps (Nangia and Bowman 2018): evaluate a nested list expression of small-number operators.

The tokens of an expression are separated by single spaces: `[MIN 2 9 [MAX 4 7 ] 0 ]`. Operators are `[MIN`, `[MAX`,
`[MED` (the median, rounded down) and `[SM` (the sum modulo 10), each closed by `]`. Operands are the digits 0 to 9 and
nested lists, so every value is a digit. The length of an expression is its number of tokens: operators, digits and
closing brackets.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from trl_steer.tasks.text import first

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: _median(values),
    "[SM": lambda values: sum(values) % 10,
}

NESTING_PROBABILITY = 0.25
MAX_ARGUMENTS = 10
MAX_DEPTH = 10

PROMPT = (
    "Evaluate the value of the following nested list expression.\n"
    "Return only the final numeric result inside <answer>...</answer>.\n\n"
    "Expression:\n{expression}\n"
)
COMPLETION = "<answer>{answer}</answer>"


def prompt(expression: str) -> str:
    return PROMPT.format(expression=expression)


def completion(answer: int | str) -> str:
    return COMPLETION.format(answer=answer)


def strict(text: str) -> str | None:
    """The number in the first `<answer>` tags that contain digits only."""
    return first(r"<answer>(\d+)</answer>", text)


def flexible(text: str) -> str | None:
    """Also allows words and punctuation around the number, and a missing closing tag at the end of the text."""
    return first(r"(?i)<\s*answer\s*>[^<\d]*?(-?\d+)[^<\d]*(?:<|\Z)", text)


def steerling(text: str) -> str | None:
    """As in the authors' code: the content of the first `<answer>` tags, if it is an integer."""
    found = (first(r"(?is)<answer>(.*?)</answer>", text) or "").strip()
    return str(int(found)) if re.fullmatch(r"[-+]?\d{1,9}", found) else None


def example(expression: str) -> dict[str, str]:
    """The expression in TRL's prompt-completion format."""
    return {"prompt": prompt(expression), "completion": completion(evaluate(expression))}


def evaluate(expression: str) -> int:
    """The value of an expression, 0 to 9.

    Raises:
        ValueError: The expression is invalid.
    """
    stack: list[list] = [[None]]
    for token in expression.split():
        if token in OPERATORS:
            stack.append([token])
        elif token == "]" and len(stack) > 1 and len(stack[-1]) > 1:
            operator, *values = stack.pop()
            stack[-1].append(OPERATORS[operator](values))
        elif len(token) == 1 and token in "0123456789":
            stack[-1].append(int(token))
        else:
            raise ValueError(
                f"Not a ListOps expression: unexpected {token!r} in {expression!r}. Expected tokens separated by "
                f"spaces: one of {', '.join(OPERATORS)}, a digit 0 to 9, or the ']' that closes a non-empty list."
            )
    if len(stack) != 1 or len(stack[0]) != 2:
        raise ValueError(
            f"Not a ListOps expression: {expression!r} has "
            + (f"{len(stack) - 1} list(s) without a closing ']'." if len(stack) > 1 else "not exactly one value.")
        )
    return stack[0][1]


def generate(count: int, *, seed: int, min_tokens: int = 4, max_tokens: int = 63) -> list[str]:
    """Samples `count` distinct expressions. The result only depends on the arguments.

    Expressions are sampled as in Long Range Arena: an operand is a list with probability 0.25, else a digit; a list
    has 2 to 10 operands; operators and digits are uniform; lists are nested at most 9 deep. Expressions outside the
    length bounds are rejected.

    Args:
        count (`int`): Number of expressions.
        seed (`int`): Random seed.
        min_tokens, max_tokens (`int`): Inclusive bounds on the number of operators, digits and closing brackets.

    Raises:
        ValueError: There are too few distinct expressions within the bounds.
    """
    if max_tokens < max(min_tokens, 4):
        raise ValueError(
            f"No expression has between {min_tokens} and {max_tokens} tokens. Use max_tokens of at least 4 and of at "
            "least min_tokens."
        )
    rng = random.Random(seed)
    found: dict[str, None] = {}  # an ordered set
    misses = 0
    while len(found) < count:
        tokens = _sample(rng, max_tokens)
        expression = " ".join(tokens) if tokens is not None and len(tokens) >= min_tokens else None
        if expression is not None and expression not in found:
            found[expression] = None
            misses = 0
        else:
            misses += 1
        if misses > 50_000:
            raise ValueError(
                f"Found only {len(found)} of {count} distinct expressions of {min_tokens} to {max_tokens} tokens. "
                "Increase max_tokens or decrease count."
            )
    return list(found)


def generate_splits(sizes: Mapping[str, int], **kwargs) -> dict[str, list[str]]:
    """Samples disjoint sets of expressions of the given sizes.

    A set does not depend on the sizes of those after it. `kwargs` are those of [`generate`].
    """
    expressions = iter(generate(sum(sizes.values()), **kwargs))
    return {name: [next(expressions) for _ in range(size)] for name, size in sizes.items()}


def largest_digit(expression: str) -> int:
    """A baseline that does not evaluate the expression: its largest digit."""
    return max(_digits(expression))


def root_operator_over_all_digits(expression: str) -> int:
    """A baseline that ignores nesting: the outermost operator applied to all digits."""
    return OPERATORS[expression.split(maxsplit=1)[0]](_digits(expression))


def _digits(expression: str) -> list[int]:
    return [int(token) for token in expression.split() if token.isdigit()]


def _median(values: Sequence[int]) -> int:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def _sample(rng: random.Random, max_tokens: int) -> list[str] | None:
    """The tokens of an expression, or `None` if there are more than `max_tokens`."""
    tokens: list[str] = []
    for token in _walk(rng, depth=1):
        tokens.append(token)
        if len(tokens) > max_tokens:
            return None
    return tokens


def _walk(rng: random.Random, depth: int) -> Iterator[str]:
    if depth > 1 and (depth >= MAX_DEPTH or rng.random() >= NESTING_PROBABILITY):
        yield str(rng.randrange(10))
        return
    yield rng.choice(list(OPERATORS))
    for _ in range(rng.randint(2, MAX_ARGUMENTS)):
        yield from _walk(rng, depth + 1)
    yield "]"
