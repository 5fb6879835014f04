"""What a reasoning model thinks before it answers is no part of its answer."""

import re
from typing import Any, NamedTuple

OPENING = "<think>"
# Tags of Qwen and DeepSeek, whose templates may have written the opening one already, of Mistral, and of gpt-oss.
PATTERN = (
    r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)"
    r"|<\|channel\|>analysis.*?(?:<\|channel\|>final<\|message\|>|\Z)"
)


class Output(NamedTuple):
    """What a model wrote: the answer and, apart from it, what was thought before."""

    text: str
    thought: str = ""


def split(text: str, pattern: re.Pattern[str] | None) -> Output:
    """Takes all that `pattern` finds out of a text, and white space around the rest. None takes nothing out.

    A thought that was cut off leaves an empty answer.
    """
    if pattern is None:
        return Output(text.strip())
    thought = "".join(found.group() for found in pattern.finditer(text))
    return Output(pattern.sub("", text).strip(), thought)


def content(choice: dict[str, Any]) -> str | None:
    """The text of one choice of a completion, or the arguments of the function that it calls; None if it has neither.

    Raises:
        AttributeError, LookupError, TypeError: if it is not formed as OpenAI's API defines it.
    """
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    calls = message.get("tool_calls") or []
    call = calls[0]["function"] if calls else message.get("function_call")
    text = call["arguments"] if call else message.get("content")
    if not isinstance(text, str | None):
        raise TypeError(f"Expected text, got {type(text).__name__}.")
    return text


def why_empty(choice: dict[str, Any]) -> str:
    """Why a choice holds no text, as far as it says so."""
    if refusal := (choice.get("message") or {}).get("refusal"):
        return f"The model refuses: {str(refusal)[:200]!r}."
    spent = ": all tokens were spent, on thoughts perhaps" if choice.get("finish_reason") == "length" else ""
    return f"The answer has no text (finish_reason {choice.get('finish_reason')}{spent})."
