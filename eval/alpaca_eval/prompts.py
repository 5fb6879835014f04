"""How an instruction is put to a model."""

from __future__ import annotations

from typing import Any

from trl_steer.tasks import alpaca

CHAT, ALPACA, AUTO = "chat", "alpaca", "auto"
FORMS = (AUTO, CHAT, ALPACA)


def resolve(form: str, tokenizer: Any) -> str:
    """`chat` or `alpaca`; for `auto`, chat where the tokenizer has a chat template.

    Raises:
        ValueError: if a chat template is asked for that is not there.
    """
    template = getattr(tokenizer, "chat_template", None)
    if form == CHAT and not template:
        raise ValueError("--prompt chat was given, but the tokenizer has no chat template; expected --prompt alpaca.")
    return (CHAT if template else ALPACA) if form == AUTO else form


def alpaca_prompt(instruction: str) -> str:
    return alpaca.prompt({"instruction": instruction, "input": ""})


def messages(instruction: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": instruction}]
