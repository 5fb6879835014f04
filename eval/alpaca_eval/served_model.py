"""Answers of a model behind an OpenAI-compatible endpoint, a vLLM server for example."""

from __future__ import annotations

from . import prompts
from .completions import Settings
from .local_model import Sampling
from .redaction import Redactor


class ServedModelError(RuntimeError):
    """The endpoint gave no output."""


class ServedModel:
    """One request for each instruction.

    Args:
        model (`str`): The name under which the server knows it.
        endpoint (`str`): Base URL.
        key (`str`, *optional*): The server's key; many local servers want none.
        form (`str`): `chat`, for which the server applies the model's template, or `alpaca`.
        settings (`Settings`): Retries and time-out, by the client of `openai`.
    """

    def __init__(self, model: str, endpoint: str, key: str | None, form: str, settings: Settings):
        import openai

        self._redactor = Redactor([key] if key else [])
        # An output is what a model says, and stays what it is: PASSWORD=postgres must not blank that word. What it
        # says is the key only if that is none that a person would write.
        is_drawn = key is not None and len(key) >= 16 and any(letter.isdigit() for letter in key)
        self._output_redactor = Redactor([key] if key and is_drawn else [], ambient=False)
        self.source = {"model": model, "adapter": None}
        self.parameters = self.weights = None  # only the server knows
        self._model, self.form = model, prompts.CHAT if form == prompts.AUTO else form
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=endpoint, max_retries=settings.retries, timeout=settings.timeout
        )

    @property
    def prompt_text(self) -> str:
        """The prompt with `{instruction}` in its place. A chat is formatted by the server; this is how it is noted."""
        if self.form == prompts.ALPACA:
            return prompts.alpaca_prompt("{instruction}")
        return "<|im_start|>user\n{instruction}<|im_end|>"

    def answer(self, instructions: list[str], sampling: Sampling) -> list[str]:
        return [self._one(instruction, sampling) for instruction in instructions]

    def _one(self, instruction: str, sampling: Sampling) -> str:
        try:
            text = self._request(instruction, sampling)
        except Exception as error:
            # Whatever goes wrong in the client may quote the request's headers.
            raise ServedModelError(self._redactor(f"{type(error).__name__}: {error}")) from None
        if text is None:
            raise ServedModelError("an answer of the endpoint holds no text")
        if not isinstance(text, str):
            raise ServedModelError(f"an answer of the endpoint holds {type(text).__name__} where text should be")
        return str(self._output_redactor(text)).strip()

    def _request(self, instruction: str, sampling: Sampling) -> str | None:
        chosen = {
            "model": self._model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if self.form == prompts.CHAT:
            chat = self._client.chat.completions.create(messages=prompts.messages(instruction), **chosen)  # type: ignore
            return chat.choices[0].message.content
        text = self._client.completions.create(prompt=prompts.alpaca_prompt(instruction), **chosen)  # type: ignore
        return text.choices[0].text
