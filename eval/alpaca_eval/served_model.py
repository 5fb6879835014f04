"""Answers of a model at an OpenAI-compatible endpoint, such as a vLLM server."""

from typing import Any

from . import thoughts
from .client import Client, EndpointError
from .local_model import ALPACA, CHAT, PLACE, Sampling, alpaca_prompt, messages
from .thoughts import Output, Pattern


class ServedModel:
    """A served model, with one request for each instruction. The server applies the chat template.

    Args:
        model (`str`), client (`Client`): Name of the model on the server, and the client.
        prompt (`str`), sampling (`Sampling`), pattern (`re.Pattern`, *optional*): As for [`LocalModel`].
        allow_empty (`bool`): Whether to accept an answer without text, such as a refusal, as an empty output.
    """

    def __init__(
        self, model: str, client: Client, prompt: str, sampling: Sampling, pattern: Pattern, allow_empty: bool = False
    ):
        self._client, self._pattern, self._allow_empty = client, pattern, allow_empty
        self._is_alpaca = prompt == ALPACA
        self._body = {"model": model, "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature > 0:  # many reasoning models do not accept these
            self._body |= {"seed": sampling.seed} | ({"top_p": sampling.top_p} if sampling.top_p < 1 else {})
        self.description = {"model": model, "prompt_form": ALPACA if self._is_alpaca else CHAT, **self._put(PLACE)}

    def _put(self, instruction: str) -> dict[str, Any]:
        if self._is_alpaca:
            return {"prompt": alpaca_prompt(instruction)}
        return {"messages": messages(instruction)}

    def answer(self, instructions: list[str]) -> list[Output]:
        """One output for each instruction."""
        return [self._one(instruction) for instruction in instructions]

    def _one(self, instruction: str) -> Output:
        choice = self._client.complete({**self._body, **self._put(instruction)})["choices"][0]
        message = choice.get("message") or {}
        text = thoughts.content(choice)
        if text is None and not self._allow_empty:
            raise EndpointError(
                f"{thoughts.why_empty(choice)} Increase --max-new-tokens (with a new --output), or pass --allow-empty "
                "to accept such answers as empty outputs."
            )
        output = thoughts.split(text or "", self._pattern)
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        return Output(output.text, f"{reasoning}{output.thought}")
