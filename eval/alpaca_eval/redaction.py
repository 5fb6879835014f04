"""Keys stay out of everything that is written or shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

# By the name of an environment variable: its value is a secret.
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
# A shorter value would blank out ordinary words, and what local servers take for a key: none, EMPTY, token.
_SHORTEST = 6
SHOWN = "[key]"


class Redactor:
    """Replaces secrets in text, also within lists and dictionaries.

    Args:
        secrets (`Iterable[str]`): What must not be shown.
        ambient (`bool`, *optional*, defaults to `True`): Nor the values of all environment variables whose name speaks
            of a key, token, secret or password.
    """

    def __init__(self, secrets: Iterable[str] = (), ambient: bool = True):
        values = (value for name, value in os.environ.items() if ambient and _SECRET_NAME.search(name))
        # Package users give several keys in one variable, separated by commas.
        parts = {part for value in (*values, *secrets) for part in (value, *value.split(","))}
        long = {part.strip() for part in parts if len(part.strip()) >= _SHORTEST}
        # An error may quote a body or a value of Python, in which a quote or a backslash is escaped.
        forms = long | {repr(part)[1:-1] for part in long} | {json.dumps(part)[1:-1] for part in long}
        longest_first = sorted(forms | {quote(part, safe="") for part in long}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, value: Any) -> Any:
        """The value with `[key]` in the place of each secret; what is neither text nor a container stays."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(SHOWN, value)
        if isinstance(value, dict):
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        return value
