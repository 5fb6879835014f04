"""Judges: those of the package `alpaca-eval` and those in YAML files, with their models and endpoints."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import upstream

LEADERBOARD = "weighted_alpaca_eval_gpt4_turbo"
OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
CONFIG = "configs.yaml"
# Allowed settings of requests. They are sent and written to result files, so that a key must not be among them.
REQUEST = (
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs"),
    *("frequency_penalty", "presence_penalty", "tools", "tool_choice", "functions", "function_call"),
    *("response_format", "reasoning_effort", "chat_template_kwargs"),
)
# Other settings in the package's files.
_OTHERS = ("model_name", "client_kwargs", "price_per_token", "requires_chatml", "num_procs", "batch_size")


@dataclass(frozen=True)
class Judge:
    """A judge, its model and its endpoint.

    `config` is its configuration in the package's format, with the text of its prompt and without an endpoint;
    `key_variable` the `api_key_env` in its file; `shipped` whether it is an unchanged judge of the package.
    """

    name: str
    config: dict[str, Any]
    model: str
    endpoint: str
    key_variable: str | None
    shipped: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of its requests, including the package's defaults."""
        chosen = {name: value for name, value in self.config["completions_kwargs"].items() if name in REQUEST}
        limit = {} if "max_completion_tokens" in chosen else {"max_tokens": 2048}
        return {**limit, "temperature": 0.7, **chosen}

    @property
    def label(self) -> str:
        """A name for folders, which includes the model if it is not the judge's own."""
        return self.name if self.shipped else re.sub(r"[^\w.-]+", "_", f"{self.name}--{self.model}")

    def folder(self, cache: Path) -> Path:
        """Its folder in the cache, which depends on everything that can change an answer."""
        identity = json.dumps([self.config, self.model, self.endpoint], sort_keys=True, default=str)
        return cache / f"{self.label}--{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def describe(self) -> dict[str, Any]:
        """A description for result files."""
        described = {"name": self.name, "model": self.model, "settings": self.settings, "endpoint": self.endpoint}
        prompt = hashlib.sha256(self.config["prompt_template"].encode()).hexdigest()
        return {**described, "prompt_sha256": prompt, "shipped": self.shipped}

    def request(self, prompt: str) -> dict[str, Any]:
        """The body of the request for a prompt, as in the package. A prompt without ChatML is a user message."""
        messages = [{"role": "user", "content": prompt.strip()}]
        if prompt.strip().startswith("<|im_start|>"):
            messages = upstream.load().utils.prompt_to_chatml(prompt)
        return {"model": self.model, "messages": messages, **self.settings}


def resolve(
    judge: str, model: str | None = None, endpoint: str | None = None, settings: Mapping[str, Any] | None = None
) -> Judge:
    """Finds a judge by its name in the package, or by the path of a YAML file in the format of its `configs.yaml`.

    Args:
        judge (`str`): Name or path. The prompt of a file is another file in its folder, or one of the package.
        model (`str`, *optional*), settings (`Mapping`, *optional*): Override those of the judge.
        endpoint (`str`, *optional*): Base URL. Default: that of the judge, if it also has `api_key_env`, else
            `OPENAI_BASE_URL`, else OpenAI's.

    Raises:
        ValueError: It does not exist, is invalid, or would send the user's key to its own endpoint.
    """
    evaluators, settings = upstream.folder() / "evaluators_configs", settings or {}
    names = sorted(config.parent.name for config in evaluators.glob(f"*/{CONFIG}"))
    shipped = judge in names
    path = evaluators / judge / CONFIG if shipped else Path(judge).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no judge {judge!r}. Pass the path of a YAML file, or one of: {', '.join(names)}.")
    name, config = _read(path)
    own = dict(config["completions_kwargs"])
    client = own.pop("client_kwargs", {})
    unknown = {*own, *settings} - {*REQUEST, *_OTHERS} | set(client) - {"base_url", "api_key_env"}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(map(str, unknown)))} cannot be set for {name}; expected {' '.join(REQUEST)}. "
            "Put a key in an environment variable, and its name in api_key_env of client_kwargs."
        )
    where, variable = _endpoint(path, endpoint, client)
    prompt = _prompt(path, config.get("prompt_template"), evaluators)
    config = {**config, "prompt_template": prompt, "completions_kwargs": {**own, **settings}}
    unchanged = shipped and model is None and not settings
    return Judge(judge if shipped else name, config, model or own["model_name"], where, variable, unchanged)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    try:
        ((name, annotator),) = yaml.safe_load(path.read_text(encoding="utf-8")).items()
        own = annotator["completions_kwargs"]
        if not isinstance(own["model_name"], str) or not isinstance(own.get("client_kwargs", {}), dict):
            raise TypeError
    except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError):  # whose message may contain a key
        raise ValueError(
            f"{path} must be YAML with the name of one judge and its settings, including model_name in "
            f"completions_kwargs, as in the package's {CONFIG} files."
        ) from None
    if annotator.get("fn_completions", "openai_completions") != "openai_completions":
        raise ValueError(f"{path} has fn_completions {annotator['fn_completions']}; expected openai_completions.")
    return str(name), annotator


def _prompt(path: Path, given: Any, evaluators: Path) -> str:
    # The package would read any local file, and would use a path that does not exist as the prompt.
    local, shipped = (path.parent / str(given)).resolve(), (evaluators / str(given)).resolve()
    if local.is_file() and local.parent == path.parent.resolve():
        return local.read_text(encoding="utf-8")
    if shipped.is_file() and shipped.is_relative_to(evaluators.resolve()):
        return shipped.read_text(encoding="utf-8")
    raise ValueError(f"{path}: the prompt_template {given!r} is neither a file next to it nor one of the package.")


def _endpoint(path: Path, given: str | None, client: Mapping[str, Any]) -> tuple[str, str | None]:
    """The endpoint, and the `api_key_env` in the YAML file."""
    own, variable = client.get("base_url"), client.get("api_key_env")
    if given is not None or own is None:
        return check_endpoint(given or os.environ.get("OPENAI_BASE_URL") or OPENAI), variable
    where = check_endpoint(str(own))
    if not isinstance(variable, str) or variable == KEY_VARIABLE:
        raise ValueError(
            f"{path} sends requests to {where}. Pass --endpoint {where} if your key may be sent there, or set "
            "api_key_env next to base_url for another key."
        )
    return where, variable


def check_endpoint(endpoint: str) -> str:
    """The endpoint without a trailing slash.

    Raises:
        ValueError: It is not a URL, or may contain a secret.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search("[@;?#]", endpoint):
        raise ValueError("--endpoint must be a URL like http://localhost:8000/v1, without credentials or a query.")
    return endpoint.rstrip("/")


def read_key(endpoint: str, named: str | None, own: str | None = None) -> str | None:
    """The key in an environment variable: `named`, else that of the judge, else `OPENAI_API_KEY`.

    Raises:
        ValueError: A required key is missing, or a key is not valid in an HTTP header.
    """
    variable = named or own or KEY_VARIABLE
    if not re.fullmatch(r"[A-Za-z_]\w*", variable):  # may be the key itself, so do not show it
        raise ValueError(f"--api-key-env must be the name of an environment variable, such as {KEY_VARIABLE}.")
    key = os.environ.get(variable, "").strip()
    if not key and (named is not None or endpoint == OPENAI):
        raise ValueError(f"The environment variable {variable} is empty. Set it to the key for {endpoint}.")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"The key in {variable} has a character that is not allowed in an HTTP header.")
    return key or None
