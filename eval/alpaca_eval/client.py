"""The client of an OpenAI-compatible endpoint, for models and judges."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from trl_steer.extras import require

from . import thoughts

# Attempts of a request whose answer is not a completion. Unlike a busy server, this seldom passes.
ATTEMPTS = 3
# After this number of consecutive failures, no further requests are sent.
MAX_CONSECUTIVE_FAILURES = 10
LONGEST_PAUSE = 60.0
NOT_SENT = "Not sent, because of earlier failures."


class EndpointError(RuntimeError):
    """A request failed, or its answer cannot be used."""


class UnreachableError(EndpointError):
    """The endpoint cannot be reached, or the connection was closed."""


class RejectedError(EndpointError):
    """The endpoint rejects the key, the model or the account, so that all other requests would fail too."""


class Client:
    """Sends requests to an endpoint, with retries.

    Args:
        endpoint (`str`), key (`str`, *optional*): Base URL and key. Many local servers do not need a key.
        in_flight (`int`): Number of concurrent requests.
        retries (`int`): Retries after status 429, 5xx, a timeout or a connection error, with increasing pauses.
        timeout (`float`): Seconds to wait for the next byte of an answer.
    """

    def __init__(
        self, endpoint: str, key: str | None = None, in_flight: int = 5, retries: int = 8, timeout: float = 120.0
    ):
        require("alpaca", "openai")
        import openai

        self.endpoint, self.in_flight, self.retries, self.timeout = endpoint, in_flight, retries, timeout
        self.stopped = threading.Event()  # when set, no further requests are sent
        self._openai = openai.OpenAI(api_key=key or "none", base_url=endpoint, timeout=timeout, max_retries=0)
        self._limit = "max_tokens"

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends one request: to `/completions` if it has a `prompt`, else to `/chat/completions`.

        `max_tokens` is sent as `max_completion_tokens` to endpoints that do not accept it.

        Returns the answer, whose first choice is valid for [`thoughts.content`].

        Raises:
            EndpointError: The request fails.
        """
        import openai

        busy = (openai.APIConnectionError, openai.RateLimitError, openai.ConflictError, openai.InternalServerError)
        for attempt in itertools.count():
            sent = {self._limit if name == "max_tokens" else name: value for name, value in body.items()}
            try:
                path = "/completions" if "prompt" in body else "/chat/completions"
                answer: Any = self._openai.post(path, body=sent, cast_to=object)
                thoughts.content(answer["choices"][0])
                return answer
            except (AttributeError, LookupError, TypeError, ValueError):
                if attempt + 1 >= ATTEMPTS or self.stopped.is_set():
                    what = "does not answer with a completion of OpenAI's API. Check the URL, which may need /v1."
                    raise EndpointError(f"{self.endpoint} {what}") from None
            except openai.OpenAIError as error:
                if "max_tokens" in sent and "max_completion_tokens" in str(error):
                    self._limit = "max_completion_tokens"
                    continue
                converted = self._converted(error)
                can_retry = isinstance(error, busy) and not isinstance(converted, RejectedError)
                if not can_retry or attempt >= self.retries or self.stopped.wait(_pause(error, attempt)):
                    raise converted from None  # the request in `error` contains the key
        raise AssertionError

    def _converted(self, error: Exception) -> EndpointError:
        import openai

        text = " ".join(str(error).split())[:300]
        if isinstance(error, openai.AuthenticationError):  # whose message may contain the key
            return RejectedError(f"{self.endpoint} rejects the key. Set the variable of --api-key-env to a valid one.")
        if isinstance(error, openai.NotFoundError) or getattr(error, "code", None) == "insufficient_quota":
            return RejectedError(f"{self.endpoint} rejects the model, the URL or the account: {text}")
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"No answer from {self.endpoint} in {self.timeout:g} seconds. Increase --timeout.")
        if isinstance(error, openai.APIConnectionError):
            return UnreachableError(f"No connection to {self.endpoint}: {error.__cause__ or text}")
        return EndpointError(f"{self.endpoint} rejects the request: {text}")

    def send_all(self, items: Iterable[Any], send: Callable[[Any], object], done: int, total: int) -> Counter[str]:
        """Calls `send` for each item in several threads, shows the progress, and counts failures by reason.

        Stops after ten consecutive failures, or after one that all other requests would share. After an interruption
        or another error, running requests are completed, since they are paid for, and no others are started.
        """
        from tqdm import tqdm

        failures: Counter[str] = Counter()
        in_a_row, lock = 0, threading.Lock()

        def work(item: Any) -> None:
            nonlocal in_a_row
            if self.stopped.is_set():
                with lock:
                    failures[NOT_SENT] += 1
                return
            try:
                send(item)
            except EndpointError as error:
                with lock:
                    failures[str(error)] += 1
                    in_a_row += 1
                if in_a_row >= MAX_CONSECUTIVE_FAILURES or isinstance(error, RejectedError):
                    self.stopped.set()
            except BaseException:
                self.stopped.set()  # the answer could not be written, so do not pay for others
                raise
            else:
                with lock:
                    in_a_row = 0
                    bar.update()

        bar = tqdm(total=total, initial=done, unit="row", disable=None)
        with bar, ThreadPoolExecutor(self.in_flight) as pool:
            try:
                list(pool.map(work, items))
            except BaseException:
                self.stopped.set()
                raise
        return failures


def _pause(error: Exception, attempt: int) -> float:
    """Seconds before the next attempt: as in the answer's headers, else exponential with random jitter."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            return min(float(headers[name]) * unit, LONGEST_PAUSE)
    return min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.0)
