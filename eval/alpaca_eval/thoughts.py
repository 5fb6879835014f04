"""Removes the thoughts of reasoning models from their answers."""

import re
from typing import Any, NamedTuple

Pattern = re.Pattern[str] | None
OPENING = "<think>"
# Tags of Qwen and DeepSeek, whose chat templates may contain the opening one, of Mistral, and of gpt-oss.
PATTERN = (
    r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)"
    r"|<\|channel\|>analysis.*?(?:<\|channel\|>final<\|message\|>|\Z)"
)


class Output(NamedTuple):
    """The answer of a model, and the thoughts before it."""

    text: str
    thought: str = ""


def split(text: str, pattern: Pattern) -> Output:
    """Separates the matches of `pattern` from the rest of a text. After a truncated thought, the rest is empty."""
    if pattern is None:
        return Output(text.strip())
    thought = "".join(found.group() for found in pattern.finditer(text))
    return Output(pattern.sub("", text).strip(), thought)


def content(choice: dict[str, Any]) -> str | None:
    """The text of a choice of a completion, or the arguments of its function call, or `None` if it has neither.

    Raises:
        AttributeError, LookupError, TypeError: It does not have the format of OpenAI's API.
    """
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    calls = message.get("tool_calls") or []
    call = calls[0]["function"] if calls else message.get("function_call")
    text = call["arguments"] if call else message.get("content")
    if not isinstance(text, str | None):
        raise TypeError(f"Expected text, got {type(text).__name__}.")
    return text


def why_empty(choice: dict[str, Any]) -> str:
    """The reason why a choice has no text, as far as known."""
    if refusal := (choice.get("message") or {}).get("refusal"):
        return f"The model refuses to answer: {str(refusal)[:200]!r}."
    spent = ": all tokens were used, possibly for thoughts" if choice.get("finish_reason") == "length" else ""
    return f"The answer has no text (finish_reason {choice.get('finish_reason')}{spent})."
