"""Requests to a judge. Every answer is stored, failures are not counted as judgements, and nothing is sent twice."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import thoughts, upstream
from .client import ATTEMPTS, Client, EndpointError, RejectedError, UnreachableError
from .journal import Journal
from .judges import Judge
from .thoughts import Pattern

# Rows to try before the first failure counts as a failure of the judge rather than of a row.
PROBES = 3
CHARACTERS_PER_TOKEN = 4
Confirm = Callable[[str], None]


class UnusableAnswerError(EndpointError):
    """An answer does not contain a judgement."""


class MissingLogprobsError(UnusableAnswerError):
    """An answer does not have log-probabilities, which is the same for all rows."""


class Completions:
    """Replaces the `fn_completions` of an annotator.

    Args:
        annotator (`SingleAnnotator`): The package's annotator, whose parser extracts judgements from answers.
        judge (`Judge`), client (`Client`), journal (`Journal`): The judge, its endpoint, and its earlier answers.
        pattern (`re.Pattern`, *optional*): Pattern of thoughts, which are removed from answers.
        confirm (`Callable[[str], None]`): Called with the cost before the first request. Raises to prevent requests.
    """

    def __init__(
        self, annotator: Any, judge: Judge, client: Client, journal: Journal, pattern: Pattern, confirm: Confirm
    ):
        self._parser, self._batch_size = annotator.fn_completion_parser, annotator.batch_size
        self._column = annotator.completion_key
        self._judge, self._client, self._journal = judge, client, journal
        self._pattern, self._confirm = pattern, confirm
        price = judge.config["completions_kwargs"].get("price_per_token")
        self._price = upstream.load().decoders.openai._get_price_per_token(judge.model, price)
        self.failures: Counter[str] = Counter()
        self._answers: dict[str, dict[str, Any]] = {}
        for record in journal.read():
            try:
                self._keep(record["prompt"], record["answer"])
            except UnusableAnswerError:
                continue

    def __call__(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        """The answers to all prompts in the format of the package's decoders, `None` for missing ones."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if _key(prompt) not in self._answers]
        if missing:
            self._confirm(self._cost(missing, len(prompts)))
            self._probe(missing)
            pending = [prompt for prompt in missing if _key(prompt) not in self._answers]
            self.failures = self._client.send_all(pending, self._ask, len(prompts) - len(pending), len(prompts))
        rows = [self._answers.get(_key(prompt), {}) for prompt in prompts]
        prices = [row.get("price", math.nan) for row in rows]
        return {self._column: [row.get(self._column) for row in rows], "price_per_example": prices}

    def preferences(self, completion: Any) -> list[Any]:
        """The parser's values. Some return 0 for a draw, which the package cannot handle if it swaps outputs."""
        return [1.5 if value == 0 and value is not False else value for value in self._parser(completion)]

    def _cost(self, missing: list[str], total: int) -> str:
        settings = self._judge.settings
        answer = settings.get("max_completion_tokens") or settings["max_tokens"]
        tokens = sum(len(prompt) // CHARACTERS_PER_TOKEN + answer for prompt in missing)
        dollars = "an unknown price" if math.isnan(self._price) else f"about {tokens * self._price:.2f} dollars"
        where = f"{len(missing)} requests to {self._judge.model} at {self._judge.endpoint}"
        return f"{where}, about {tokens} tokens, {dollars}. {total - len(missing)} judgements are already available."

    def _probe(self, prompts: list[str]) -> None:
        """Sends a single request before all others. If it fails because of its row, tries other rows."""
        # Not for a judge that has answered before: if it fails now, requests stop after ten consecutive failures.
        tried = [] if self._answers else prompts[:PROBES]
        for prompt in tried:
            try:
                self._ask(prompt)
                return
            except EndpointError as error:
                everywhere = isinstance(error, RejectedError | UnreachableError | MissingLogprobsError)
                if everywhere or prompt == tried[-1]:
                    raise EndpointError(f"The first request to {self._judge.name} failed. {error}") from None

    def _ask(self, prompt: str) -> None:
        """Sends requests until there is a judgement, and stores every answer."""
        body, key = self._judge.request(prompt), _key(prompt)
        for attempt in range(1, ATTEMPTS + 1):
            answer = self._client.complete(body)
            self._journal.append({"prompt": key, "answer": answer})
            try:
                self._keep(key, answer)
                return
            except UnusableAnswerError as error:
                first = isinstance(error, MissingLogprobsError) and not self._answers
                if first or attempt == ATTEMPTS or self._client.stopped.is_set():
                    raise

    def _keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keeps the fields of an answer for the parser."""
        choice = answer["choices"][0]
        text = thoughts.content(choice)
        if text is None:
            advice = "Allow more tokens with --judge-setting max_tokens=N, or choose another judge."
            raise UnusableAnswerError(f"{thoughts.why_empty(choice)} {advice}")
        text = thoughts.split(text, self._pattern).text if self._pattern else text
        found: dict[str, Any] = {"completions": text, "completions_all": {**choice, "text": text}}
        try:
            found["price"] = ((answer.get("usage") or {}).get("total_tokens") or 0) * self._price
            values = self.preferences(found[self._column])
        except Exception:  # parsers may raise any exception
            values = []
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(values) == self._batch_size == sum(1 <= number <= 2 for number in numbers):
            self._answers[key] = found
        elif self._column == "completions_all" and not _has_logprobs(choice):
            raise MissingLogprobsError(
                "The answer has no log-probabilities, which this judge needs. Use a server that returns them, or a "
                "judge that does not need them, such as alpaca_eval_gpt4_turbo_fn."
            )
        else:
            raise UnusableAnswerError(f"The answer has no judgement: {text[:80]!r}.")


def _has_logprobs(choice: Mapping[str, Any]) -> bool:
    try:
        return bool(choice["logprobs"]["content"][0]["top_logprobs"])
    except (LookupError, TypeError):
        return False


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
