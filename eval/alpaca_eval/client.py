"""One OpenAI-compatible endpoint, for models and for judges."""

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

# How often an answer that is no completion is asked for again: a web page does not pass like a busy server.
ATTEMPTS = 3
# So many failures in a row are no matter of single rows any more.
GIVE_UP_AFTER = 10
LONGEST_PAUSE = 60.0
NOT_ASKED = "Not asked any more after those before had failed."


class EndpointError(RuntimeError):
    """A request brought nothing that can be used."""


class UnreachableError(EndpointError):
    """There is nobody at the endpoint, or the connection broke off."""


class RejectedError(EndpointError):
    """The endpoint rejects the key, the model or the account, and so every other request too."""


class Client:
    """Asks an endpoint, with retries that an interruption ends.

    Args:
        endpoint (`str`), key (`str`, *optional*): Base URL, and its key; many local servers want none.
        in_flight (`int`): Requests at a time.
        retries (`int`): Repeats of a request that met 429, 5xx, a time-out or no connection, with growing pauses.
        timeout (`float`): Seconds without any byte of an answer after which a request has failed.
    """

    def __init__(
        self, endpoint: str, key: str | None = None, in_flight: int = 5, retries: int = 8, timeout: float = 120.0
    ):
        require("alpaca", "openai")
        import openai

        self.endpoint, self.in_flight, self.retries, self.timeout = endpoint, in_flight, retries, timeout
        self.stopped = threading.Event()  # once it is set, no request is sent any more
        self._openai = openai.OpenAI(api_key=key or "none", base_url=endpoint, timeout=timeout, max_retries=0)
        self._limit = "max_tokens"

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends one request: to `/completions` if it has a `prompt`, else to `/chat/completions`.

        `max_tokens` is sent as `max_completion_tokens` to endpoints that refuse it.

        Returns the endpoint's answer, unchanged, whose first choice [`thoughts.content`] can read. Raises
        `EndpointError` if there is none.
        """
        import openai

        passing = (openai.APIConnectionError, openai.RateLimitError, openai.ConflictError, openai.InternalServerError)
        for attempt in itertools.count():
            sent = {self._limit if name == "max_tokens" else name: value for name, value in body.items()}
            try:
                path = "/completions" if "prompt" in body else "/chat/completions"
                answer: Any = self._openai.post(path, body=sent, cast_to=object)
                thoughts.content(answer["choices"][0])
                return answer
            except (AttributeError, LookupError, TypeError, ValueError):
                if attempt + 1 >= ATTEMPTS or self.stopped.is_set():
                    said = "answers no completion as OpenAI's API defines it; does the URL lack an ending, /v1?"
                    raise EndpointError(f"{self.endpoint} {said}") from None
            except openai.OpenAIError as error:
                if "max_tokens" in sent and "max_completion_tokens" in str(error):
                    self._limit = "max_completion_tokens"
                    continue
                explained = self._explained(error)
                passes = isinstance(error, passing) and not isinstance(explained, RejectedError)
                if not passes or attempt >= self.retries or self.stopped.wait(_pause(error, attempt)):
                    raise explained from None  # the error's request holds the key
        raise AssertionError

    def _explained(self, error: Exception) -> EndpointError:
        import openai

        said = " ".join(str(error).split())[:300]
        if isinstance(error, openai.AuthenticationError):  # what it says may hold the key
            return RejectedError(f"{self.endpoint} rejects the key; see --api-key-env for where it is read from.")
        if isinstance(error, openai.NotFoundError) or getattr(error, "code", None) == "insufficient_quota":
            return RejectedError(f"{self.endpoint} rejects the model, the URL or the account: {said}")
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"No answer of {self.endpoint} within {self.timeout:g} seconds; raise --timeout.")
        if isinstance(error, openai.APIConnectionError):
            return UnreachableError(f"No connection to {self.endpoint}: {error.__cause__ or said}")
        return EndpointError(f"{self.endpoint} refuses the request: {said}")

    def ask_all(self, items: Iterable[Any], ask: Callable[[Any], object], done: int, total: int) -> Counter[str]:
        """Calls `ask` for every item, some at a time, shows how far it is, and counts why items failed.

        Ten failures in a row, or one that every other request would share, end the asking. After an interruption or
        an error of another kind the requests under way come to an end, since they are paid for, and no other starts.
        """
        from tqdm import tqdm

        failures: Counter[str] = Counter()
        in_a_row, lock = 0, threading.Lock()

        def work(item: Any) -> None:
            nonlocal in_a_row
            if self.stopped.is_set():
                with lock:
                    failures[NOT_ASKED] += 1
                return
            try:
                ask(item)
            except EndpointError as error:
                with lock:
                    failures[str(error)] += 1
                    in_a_row += 1
                if in_a_row >= GIVE_UP_AFTER or isinstance(error, RejectedError):
                    self.stopped.set()
            except BaseException:
                self.stopped.set()  # an answer could not be kept: no other is to be paid for
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
    """Seconds: as long as the server asks for, else longer each time and not the same for all threads."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            return min(float(headers[name]) * unit, LONGEST_PAUSE)
    return min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.0)
