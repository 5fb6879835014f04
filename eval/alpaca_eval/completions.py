"""Asking a judge, so that no answer is lost, no failure counts, and nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from . import package
from .journal import Journal
from .judges import OPENAI_FUNCTION, Judge
from .redaction import Redactor

# How often an answer that cannot be used is asked for again. Errors of the network are for the client's own retries.
ATTEMPTS = 3
# How many rows may fail for what is in them before it counts as the judge's failing.
PROBES = 3
# So many rows that fail one after the other mean that it is not about the rows.
GIVE_UP_AFTER = 10
# A function that runs a model in this process may load it for every call, so it is called with many rows at a time.
LOCAL_CHUNK = 128
CHARACTERS_PER_TOKEN = 4
# What the client and the package raise over an HTML page, broken JSON, or JSON of another form.
_MISREAD = (AssertionError, AttributeError, LookupError, TypeError, json.JSONDecodeError)


class AskingError(RuntimeError):
    """The judge cannot be asked."""


class UnusableAnswerError(ValueError):
    """There is an answer, but no judgement in it."""


class MissingLogprobsError(UnusableAnswerError):
    """An answer without log-probabilities: this will not be another judge for another row."""


class StoppedError(BaseException):
    """No request is to be made any more. Not an `Exception`, which the client would take for a lost connection."""


class RefusedError(RuntimeError):
    """The endpoint would not answer a request, for its rate or its content."""


@dataclass(frozen=True)
class Estimate:
    """What is about to be asked. `dollars` is None where the package knows no price for the model."""

    calls: int
    done: int
    tokens: int
    dollars: float | None


@dataclass(frozen=True)
class Settings:
    """How to ask.

    Attributes:
        in_flight (`int`): Most requests at a time.
        retries (`int`): How often the client repeats a request that met a 429, a 5xx, a time-out or no connection,
            with growing pauses.
        timeout (`float`): Seconds without any byte of an answer after which a request counts as failed.
    """

    in_flight: int = 5
    retries: int = 8
    timeout: float = 120.0


def as_preferences(parser: Callable[[Any], Iterable[Any]]) -> Callable[[Any], list[float]]:
    """A parser of the package's, its values as the numbers that the package works with: 1 to 2, 1.5 for a draw.

    Some give 0 for a draw, or text. Over one such value the package fails for all rows, after the last call.
    """

    def parse(completion: Any) -> list[float]:
        return [_preference(value) for value in parser(completion)]

    return parse


def _preference(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("a truth value is no preference")
    number = float(value)
    return 1.5 if number == 0 else number


class Completions:
    """Stands in the place of an annotator's `fn_completions`, and asks that function for one prompt at a time.

    Args:
        annotator (`SingleAnnotator`): The package's; its parser decides which answers are judgements.
        judge (`Judge`): Endpoint and keys.
        journal (`Journal`): Answers of earlier runs, and soon of this one.
        settings (`Settings`): How to ask.
        redactor (`Redactor`): What is written or raised goes through it.
        confirm (`Callable[[Estimate], None]`): Called before the first request; raises to prevent it.
    """

    def __init__(
        self,
        annotator: Any,
        judge: Judge,
        journal: Journal,
        settings: Settings,
        redactor: Redactor,
        confirm: Callable[[Estimate], None],
    ):
        self._annotator, self._ask = annotator, annotator.fn_completions
        self._judge, self._journal, self._settings = judge, journal, settings
        self._redactor, self._confirm = redactor, confirm
        self._local = "local" in self._ask.__name__
        self._lock = threading.Lock()
        self._answers = {record["prompt"]: record["answer"] for record in journal.read() if record.get("usable")}
        self._in_a_row = 0
        self._stopped: str | None = None
        self.requests = 0
        self.failures: Counter[str] = Counter()

    def __call__(self, prompts: Sequence[str], **decoding: Any) -> dict[str, list[Any]]:
        """The answers to all prompts, as the package's decoders give them; None where there is none."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if _key(prompt) not in self._answers]
        if missing:
            self._confirm(self._estimate(missing, len(prompts), decoding))
            decoding = self._with_client(decoding)
            self._probe(missing, decoding)
            self._ask_all([prompt for prompt in missing if _key(prompt) not in self._answers], decoding)
        return self._columns(prompts)

    def _estimate(self, missing: list[str], total: int, decoding: Mapping[str, Any]) -> Estimate:
        answer = decoding.get("max_tokens")
        answer = answer if isinstance(answer, int) else 0
        tokens = sum(len(prompt) // CHARACTERS_PER_TOKEN + answer for prompt in missing)
        price = math.nan
        if self._is_openai:
            decoder = package.load().decoders.openai
            price = decoder._get_price_per_token(decoding["model_name"], decoding.get("price_per_token"))
        return Estimate(len(missing), total - len(missing), tokens, None if math.isnan(price) else tokens * price)

    @property
    def _is_openai(self) -> bool:
        return self._ask.__name__ == OPENAI_FUNCTION

    def _with_client(self, decoding: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a call, with endpoint, keys and the client's patience."""
        if not self._is_openai:
            return dict(decoding)
        import openai

        given = decoding.get("client_kwargs") or {}
        client = {"timeout": self._settings.timeout, "max_retries": self._settings.retries, **given}
        # One pool of connections. The package makes a client for every call, which takes 0.1 s without this.
        hooks = {"request": [self._not_if_stopped]}
        client.setdefault("http_client", openai.DefaultHttpxClient(timeout=client["timeout"], event_hooks=hooks))
        return {
            **decoding,
            "num_procs": 1,
            "n_retries": 1,  # the client's own retries wait longer each time, and as long as the server asks for
            "sleep_time": 0,
            "client_config_path": "",
            "openai_api_keys": list(self._judge.keys) or ["none"],
            "openai_api_base": self._judge.endpoint,
            "client_kwargs": client,
        }

    def _not_if_stopped(self, request: Any) -> None:
        """Ends the client's retries too, which know nothing of an interruption."""
        if self._stopped is not None:
            raise StoppedError(self._stopped)

    def _probe(self, prompts: list[str], decoding: Mapping[str, Any]) -> None:
        """One call before all others; where it fails for what is in its row, one for another row."""
        tried = prompts[:PROBES]
        for number, prompt in enumerate(tried, start=1):
            error = self._ask_for([prompt], decoding, probing=True)
            if error is None:
                break
            if _is_final(error):
                raise self._cannot_ask(error)
            # A judge that has answered before need not be at fault: a few rows may be left that fail. If it is, ten
            # failures in a row will end the asking.
            if self._answers:
                break
            if not _is_about_the_row(error) or number == len(tried):
                raise self._cannot_ask(error)
        self.failures.clear()  # those rows have their turn with the others
        self._in_a_row = 0

    def _cannot_ask(self, error: Exception) -> AskingError:
        return AskingError(
            f"the judge could not be asked for a first judgement: {self._describe(error)}. Asked: "
            f"{', '.join(self._judge.models)} at {self._judge.endpoint or 'its provider'}."
        )

    def _describe(self, error: Exception) -> str:
        if isinstance(error, AskingError | UnusableAnswerError):
            return self._redactor(str(error))
        said = f"{type(error).__name__}: {error}"
        if self._is_openai and isinstance(error, _MISREAD):
            said = f"what the endpoint answers is no completion as OpenAI's API defines it ({said})"
        return self._redactor(said)

    def _ask_all(self, prompts: list[str], decoding: Mapping[str, Any]) -> None:
        from tqdm import tqdm

        size = LOCAL_CHUNK if self._local else 1
        units = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        with (
            tqdm(total=len(prompts), desc="judging", unit="row", disable=None) as bar,
            ThreadPoolExecutor(1 if self._local else self._settings.in_flight) as pool,
        ):

            def work(unit: list[str]) -> None:
                try:
                    self._ask_for(unit, decoding)
                except BaseException:
                    self._stopped = "an answer could not be kept"  # so that no other is paid for
                    raise
                with self._lock:
                    bar.update(len(unit))

            try:
                list(pool.map(work, units))
            except BaseException:
                # Requests that are under way are paid for and come to an end; no other starts.
                self._stopped = "interrupted"
                raise

    def _ask_for(self, prompts: list[str], decoding: Mapping[str, Any], probing: bool = False) -> Exception | None:
        """Asks until each prompt has a judgement or has failed for good; returns why the last one failed."""
        pending = prompts
        error: Exception | None = None
        for _ in range(ATTEMPTS):
            if self._stopped is not None:
                error = error or AskingError(self._stopped)
                break
            with self._lock:
                self.requests += len(pending)
            try:
                answers = self._call(pending, decoding)
            except StoppedError as stopped:
                error = error or AskingError(str(stopped))
                break
            except Exception as raised:  # whatever it is, it must not cost the other rows
                error = raised
                if _is_final(raised):
                    self._stopped = self._describe(raised)
                if _is_final(raised) or _was_retried(raised):
                    break
                continue
            pending, error = self._keep(pending, answers)
            if not pending or (probing and isinstance(error, MissingLogprobsError)):
                break
        self._count(len(prompts) - len(pending), len(pending), error)
        return error

    def _call(self, prompts: list[str], decoding: Mapping[str, Any]) -> list[dict[str, Any]]:
        columns = self._ask(prompts=prompts, **decoding)
        answers = [{name: values[index] for name, values in columns.items()} for index in range(len(prompts))]
        for answer in answers:
            # What the package gives for a request that was refused for its rate or by a content filter.
            if answer.get("completions_all") == {"text": "", "total_tokens": 0}:
                raise RefusedError("the endpoint refused the request, for its rate or its content")
        return answers

    def _keep(self, prompts: list[str], answers: list[dict[str, Any]]) -> tuple[list[str], UnusableAnswerError | None]:
        """Writes all answers down, and returns the prompts whose answer holds no judgement, with the reason."""
        unusable: list[str] = []
        reason = None
        for prompt, answer in zip(prompts, answers, strict=True):
            record = {"prompt": _key(prompt), "usable": True, "answer": self._redactor(answer)}
            try:
                self._check(record["answer"])
            except UnusableAnswerError as error:
                unusable.append(prompt)
                reason = error
                self._journal.append({**record, "usable": False, "reason": str(error)})
            else:
                (kept,) = self._journal.append(record)
                with self._lock:
                    self._answers[_key(prompt)] = kept["answer"]
        return unusable, reason

    def _check(self, answer: Mapping[str, Any]) -> None:
        """Raises unless the package's parser finds a judgement for each row of the prompt."""
        completion = answer.get(self._annotator.completion_key)
        try:
            values = self._annotator.fn_completion_parser(completion)
        except Exception as error:
            _require_logprobs(completion)
            raise UnusableAnswerError(f"the answer cannot be read ({type(error).__name__})") from error
        if len(values) != self._annotator.batch_size or not all(1 <= value <= 2 for value in values):
            _require_logprobs(completion)
            raise UnusableAnswerError(f"the answer names no winner: {str(answer.get('completions'))[:80]!r}")

    def _count(self, kept: int, failed: int, error: Exception | None) -> None:
        with self._lock:
            self._in_a_row = 0 if kept else self._in_a_row + failed
            if failed and error is not None:
                self.failures[self._describe(error)] += failed
            if self._in_a_row >= GIVE_UP_AFTER and self._stopped is None:
                self._stopped = f"not asked, since {self._in_a_row} rows in a row had failed"

    def _columns(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        rows = [self._answers.get(_key(prompt), {}) for prompt in prompts]
        names = dict.fromkeys([self._annotator.completion_key, *(name for row in rows for name in row)])
        # The package divides numbers "per example" by the size of a batch.
        return {name: [row.get(name, math.nan if "per_example" in name else None) for row in rows] for name in names}


def _require_logprobs(completion: Any) -> None:
    """Raises `MissingLogprobsError` if a whole answer, from which no judgement could be read, has none."""
    if not isinstance(completion, Mapping):
        return
    logprobs = completion.get("logprobs")
    if isinstance(logprobs, Mapping) and "content" in logprobs:
        # Of a chat; some servers send the frame without anything in it.
        logprobs = logprobs["content"]
        if isinstance(logprobs, list):
            logprobs = [token for token in logprobs if not isinstance(token, Mapping) or token.get("top_logprobs")]
    if not logprobs:
        raise MissingLogprobsError(
            "the answer has no log-probabilities (logprobs, top_logprobs), which this judge reads its judgement from"
        )


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def _is_final(error: Exception) -> bool:
    """Whether every other request would fail in the same way. A 403 may be about the content of one row."""
    import openai

    return isinstance(error, openai.AuthenticationError | openai.NotFoundError)


def _is_about_the_row(error: Exception) -> bool:
    """Whether another row may well succeed."""
    import openai

    if isinstance(error, openai.APIConnectionError):
        return isinstance(error, openai.APITimeoutError)
    return not isinstance(error, MissingLogprobsError) and not _is_final(error)


def _was_retried(error: Exception) -> bool:
    """Whether the client has already repeated the request, or knows that it cannot succeed."""
    import openai

    return isinstance(error, RefusedError | openai.APIConnectionError | openai.APIStatusError)
