"""Asking a judge, so that no answer is lost, no failure counts, and nothing is asked twice."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import thoughts, upstream
from .client import ATTEMPTS, Client, EndpointError, RejectedError, UnreachableError
from .journal import Journal
from .judges import Judge

# How many rows may fail for what is in them before it counts as the judge's failing.
PROBES = 3
CHARACTERS_PER_TOKEN = 4


class UnusableAnswerError(EndpointError):
    """There is an answer, but no judgement in it."""


class MissingLogprobsError(UnusableAnswerError):
    """An answer without log-probabilities: this will not be another judge for another row."""


class Completions:
    """Stands in the place of an annotator's `fn_completions`.

    Args:
        annotator (`SingleAnnotator`): The package's; its parser decides which answers are judgements.
        judge (`Judge`), client (`Client`), journal (`Journal`): What to send, where, and what was answered before.
        pattern (`re.Pattern`, *optional*): What is a thought, which the parser does not get to see.
        confirm (`Callable[[str], None]`): Called with the cost before the first request; raises to prevent it.
    """

    def __init__(
        self,
        annotator: Any,
        judge: Judge,
        client: Client,
        journal: Journal,
        pattern: re.Pattern[str] | None,
        confirm: Callable[[str], None],
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
        """The answers to all prompts, as the package's decoders give them; None where there is none."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if _key(prompt) not in self._answers]
        if missing:
            self._confirm(self._cost(missing, len(prompts)))
            self._probe(missing)
            pending = [prompt for prompt in missing if _key(prompt) not in self._answers]
            self.failures = self._client.ask_all(pending, self._ask, len(prompts) - len(pending), len(prompts))
        rows = [self._answers.get(_key(prompt), {}) for prompt in prompts]
        prices = [row.get("price", math.nan) for row in rows]
        return {self._column: [row.get(self._column) for row in rows], "price_per_example": prices}

    def preferences(self, completion: Any) -> list[Any]:
        """The parser's values. Some give 0 for a draw, over which the package fails where it switched the outputs."""
        return [1.5 if value == 0 and value is not False else value for value in self._parser(completion)]

    def _cost(self, missing: list[str], total: int) -> str:
        settings = self._judge.settings
        answer = settings.get("max_completion_tokens") or settings["max_tokens"]
        tokens = sum(len(prompt) // CHARACTERS_PER_TOKEN + answer for prompt in missing)
        dollars = "an unknown price" if math.isnan(self._price) else f"about {tokens * self._price:.2f} dollars"
        where = f"{len(missing)} calls of {self._judge.model} at {self._judge.endpoint}"
        return f"{where}, about {tokens} tokens, {dollars}; {total - len(missing)} judgements are there already."

    def _probe(self, prompts: list[str]) -> None:
        """One call before all others; where it fails for what is in its row, one for another row."""
        # A judge that has answered before is not tried: if it is at fault now, ten failures in a row end the asking.
        tried = [] if self._answers else prompts[:PROBES]
        for prompt in tried:
            try:
                self._ask(prompt)
                return
            except EndpointError as error:
                everywhere = isinstance(error, RejectedError | UnreachableError | MissingLogprobsError)
                if everywhere or prompt == tried[-1]:
                    raise EndpointError(f"{self._judge.name} gave no first judgement. {error}") from None

    def _ask(self, prompt: str) -> None:
        """Asks until the prompt has a judgement, and writes down every answer."""
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
        """Keeps what the parser needs of an answer. Raises `UnusableAnswerError` if there is no judgement in it."""
        choice = answer["choices"][0]
        text = thoughts.content(choice)
        if text is None:
            way_out = "Give the judge more tokens by --judge-setting max_tokens=N, or choose another."
            raise UnusableAnswerError(f"{thoughts.why_empty(choice)} {way_out}")
        text = thoughts.split(text, self._pattern).text if self._pattern else text
        found: dict[str, Any] = {"completions": text, "completions_all": {**choice, "text": text}}
        try:
            found["price"] = ((answer.get("usage") or {}).get("total_tokens") or 0) * self._price
            values = self.preferences(found[self._column])
        except Exception:  # whatever the parser stumbles over
            values = []
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(values) == self._batch_size == sum(1 <= number <= 2 for number in numbers):
            self._answers[key] = found
        elif self._column == "completions_all" and not _has_logprobs(choice):
            raise MissingLogprobsError(
                "The answer has no log-probabilities, which this judge needs; choose a server that gives them, or "
                "a judge that answers in words, alpaca_eval_gpt4_turbo_fn for example."
            )
        else:
            raise UnusableAnswerError(f"The answer names no winner: {text[:80]!r}.")


def _has_logprobs(choice: Mapping[str, Any]) -> bool:
    try:
        return bool(choice["logprobs"]["content"][0]["top_logprobs"])
    except (LookupError, TypeError):
        return False


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
