"""ListOps (Nangia and Bowman 2018): evaluate a nested list expression of small-number operators.

An expression is written with its tokens separated by single spaces, `[MIN 2 9 [MAX 4 7 ] 0 ]`. Operators are `[MIN`,
`[MAX`, `[MED` (the median, rounded down) and `[SM` (the sum modulo 10), each closed by `]`; leaves are the digits 0 to
9, so every value is a digit too. The length of an expression is its number of tokens: operators, digits, brackets.

Everything here is a pure function of its arguments. The prompt, the completion and the way an answer is read from
generated text are written once, here, and used for training data and for evaluation alike.
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
    """The whole number in the first `<answer>` tags that hold one and nothing else."""
    return first(r"<answer>(\d+)</answer>", text)


def flexible(text: str) -> str | None:
    """The same with words or marks around the number, and where the closing tag is missing at the end of the text."""
    return first(r"(?i)<\s*answer\s*>[^<\d]*?(-?\d+)[^<\d]*(?:<|\Z)", text)


def steerling(text: str) -> str | None:
    """As the authors' code reads: what the first `<answer>` tags hold, if that is a whole number."""
    found = (first(r"(?is)<answer>(.*?)</answer>", text) or "").strip()
    return str(int(found)) if re.fullmatch(r"[-+]?\d{1,9}", found) else None


def example(expression: str) -> dict[str, str]:
    """The expression as TRL's prompt-completion example."""
    return {"prompt": prompt(expression), "completion": completion(evaluate(expression))}


def evaluate(expression: str) -> int:
    """The value of an expression, 0 to 9.

    Raises:
        ValueError: if the expression does not follow the grammar of this module.
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
            + (f"{len(stack) - 1} list(s) that no ']' closes." if len(stack) > 1 else "not exactly one value.")
        )
    return stack[0][1]


def generate(count: int, *, seed: int, min_tokens: int = 4, max_tokens: int = 63) -> list[str]:
    """Draws `count` distinct expressions; the same arguments always give the same list.

    The tree sampler is the one of Long Range Arena: an argument is a list with probability 0.25, else a digit; a list
    has 2 to 10 arguments; operators and digits are uniform; lists go at most 9 deep. Expressions outside the length
    bounds are rejected.

    Args:
        count (`int`): How many expressions.
        seed (`int`): Seed of the generator.
        min_tokens, max_tokens (`int`): Bounds, both included, on operators + digits + closing brackets.

    Raises:
        ValueError: if the bounds admit too few expressions for `count` distinct ones.
    """
    if max_tokens < max(min_tokens, 4):
        raise ValueError(f"No expression has between {min_tokens} and {max_tokens} tokens; the shortest list has 4.")
    rng = random.Random(seed)
    found: dict[str, None] = {}  # a set that keeps its order
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
                f"Only {len(found)} distinct expressions of {min_tokens} to {max_tokens} tokens were found where "
                f"{count} were asked for; raise max_tokens or ask for fewer."
            )
    return list(found)


def generate_splits(sizes: Mapping[str, int], **kwargs) -> dict[str, list[str]]:
    """Draws several sets of expressions at once, no expression in more than one of them.

    A split does not change when the size of one that comes after it does. `kwargs` are those of [`generate`].
    """
    expressions = iter(generate(sum(sizes.values()), **kwargs))
    return {name: [next(expressions) for _ in range(size)] for name, size in sizes.items()}


def largest_digit(expression: str) -> int:
    """A shortcut that evaluates nothing: the largest digit that the expression contains."""
    return max(_digits(expression))


def root_operator_over_all_digits(expression: str) -> int:
    """A shortcut that ignores nesting: the outermost operator applied to all digits, as if it were one flat list."""
    return OPERATORS[expression.split(maxsplit=1)[0]](_digits(expression))


def _digits(expression: str) -> list[int]:
    return [int(token) for token in expression.split() if token.isdigit()]


def _median(values: Sequence[int]) -> int:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


def _sample(rng: random.Random, max_tokens: int) -> list[str] | None:
    """One expression's tokens, or None as soon as it is sure to have more than `max_tokens`."""
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
