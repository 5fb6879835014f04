"""Adapters that cannot be served: the error in the engine, and the answer of the server's load endpoint."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

_MARK = "Adapter refused: "
# What vLLM's executor for several processes writes behind an error of a worker.
_BEHIND = "', please check the stack trace"


class AdapterRefusedError(ValueError):
    """An adapter cannot be served. The engine goes on."""

    def __init__(self, reason: object):
        super().__init__(f"{_MARK}{reason}")


def reason_in(message: str) -> str | None:
    """The reason in the message of an error that reached the server from the engine, `None` for other errors."""
    _, found, reason = message.partition(_MARK)
    return reason.partition(_BEHIND)[0] if found else None


def answer_with_status_400(serving_models: Any) -> None:
    """Lets the load endpoint answer with status 400 and the reason, where vLLM answers with 500, an error of its own.

    Args:
        serving_models (`type`): vLLM's `OpenAIServingModels`.
    """
    from vllm.entrypoints.serve import create_error_response

    load = serving_models.load_lora_adapter

    async def load_lora_adapter(self, request, base_model_name=None):
        answer = await load(self, request, base_model_name)
        error = getattr(answer, "error", None)
        reason = None if error is None else reason_in(error.message)
        if reason is None:
            return answer
        message = f"The adapter {request.lora_name!r} cannot be served: {reason}"
        return create_error_response(message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)

    serving_models.load_lora_adapter = load_lora_adapter
