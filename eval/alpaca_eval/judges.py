"""Which judge: one that the package ships, or a YAML file; which model and endpoint answer for it."""

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
# What a judge's requests may hold. It is sent and written to result files, so that a key has no place in it.
REQUEST = (
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs"),
    *("frequency_penalty", "presence_penalty", "tools", "tool_choice", "functions", "function_call"),
    *("response_format", "reasoning_effort", "chat_template_kwargs"),
)
# Read here, or of no use but to the package itself.
_OTHERS = ("model_name", "client_kwargs", "price_per_token", "requires_chatml", "num_procs", "batch_size")


@dataclass(frozen=True)
class Judge:
    """A judge and what answers for it.

    `config` is its annotator in the package's form, with the text of its prompt and without an endpoint;
    `key_variable`, the environment variable that its file names; `shipped`, whether it is the package's, unchanged.
    """

    name: str
    config: dict[str, Any]
    model: str
    endpoint: str
    key_variable: str | None
    shipped: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of its requests, with the package's defaults."""
        chosen = {name: value for name, value in self.config["completions_kwargs"].items() if name in REQUEST}
        limit = {} if "max_completion_tokens" in chosen else {"max_tokens": 2048}
        return {**limit, "temperature": 0.7, **chosen}

    @property
    def label(self) -> str:
        """A name for folders, which tells judges with another model apart."""
        return self.name if self.shipped else re.sub(r"[^\w.-]+", "_", f"{self.name}--{self.model}")

    def folder(self, cache: Path) -> Path:
        """Its own place in the cache: another one for whatever can change an answer."""
        identity = json.dumps([self.config, self.model, self.endpoint], sort_keys=True, default=str)
        return cache / f"{self.label}--{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    def describe(self) -> dict[str, Any]:
        """For result files."""
        described = {"name": self.name, "model": self.model, "settings": self.settings, "endpoint": self.endpoint}
        prompt = hashlib.sha256(self.config["prompt_template"].encode()).hexdigest()
        return {**described, "prompt_sha256": prompt, "shipped": self.shipped}

    def request(self, prompt: str) -> dict[str, Any]:
        """The body of the request for a prompt: what the package would send. Without ChatML it is a user's message."""
        messages = [{"role": "user", "content": prompt.strip()}]
        if prompt.strip().startswith("<|im_start|>"):
            messages = upstream.load().utils.prompt_to_chatml(prompt)
        return {"model": self.model, "messages": messages, **self.settings}


def resolve(
    judge: str, model: str | None = None, endpoint: str | None = None, settings: Mapping[str, Any] | None = None
) -> Judge:
    """Finds a judge by its name in the package, or by the path of a YAML file in the form of its `configs.yaml`.

    Args:
        judge (`str`): Which one. The prompt of a file is a file beside it, or one of the package's.
        model (`str`, *optional*), settings (`Mapping`, *optional*): Take the place of the judge's own.
        endpoint (`str`, *optional*): Base URL. Otherwise the judge's own, if that names the variable with its key too,
            else that of `OPENAI_BASE_URL`, else OpenAI's.

    Raises:
        ValueError: if it does not exist, is not well formed, or would send a key where the user did not say.
    """
    evaluators, settings = upstream.folder() / "evaluators_configs", settings or {}
    names = sorted(config.parent.name for config in evaluators.glob(f"*/{CONFIG}"))
    shipped = judge in names
    path = evaluators / judge / CONFIG if shipped else Path(judge).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no judge {judge!r}. Give the path of a YAML file, or one of: {', '.join(names)}.")
    name, config = _read(path)
    own = dict(config["completions_kwargs"])
    client = own.pop("client_kwargs", {})
    unknown = {*own, *settings} - {*REQUEST, *_OTHERS} | set(client) - {"base_url", "api_key_env"}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(map(str, unknown)))} cannot be set for {name}; expected {' '.join(REQUEST)}. "
            "A key belongs in an environment variable, which api_key_env in client_kwargs can name."
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
    except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError):  # which may quote a key
        raise ValueError(
            f"{path} should be YAML that maps one judge's name to its settings, with a model_name in "
            f"completions_kwargs, as the package's {CONFIG} files do."
        ) from None
    if annotator.get("fn_completions", "openai_completions") != "openai_completions":
        raise ValueError(f"{path} asks by {annotator['fn_completions']}; expected openai_completions.")
    return str(name), annotator


def _prompt(path: Path, given: Any, evaluators: Path) -> str:
    # The package would take any file of the machine for a prompt, and a path that does not exist for its text.
    beside, shipped = (path.parent / str(given)).resolve(), (evaluators / str(given)).resolve()
    if beside.is_file() and beside.parent == path.parent.resolve():
        return beside.read_text(encoding="utf-8")
    if shipped.is_file() and shipped.is_relative_to(evaluators.resolve()):
        return shipped.read_text(encoding="utf-8")
    raise ValueError(f"{path}: the prompt_template {given!r} is no file beside it and none of the package's.")


def _endpoint(path: Path, given: str | None, client: Mapping[str, Any]) -> tuple[str, str | None]:
    """The endpoint, and the variable with its key where the YAML file names one."""
    own, variable = client.get("base_url"), client.get("api_key_env")
    if given is not None or own is None:
        return check_endpoint(given or os.environ.get("OPENAI_BASE_URL") or OPENAI), variable
    where = check_endpoint(str(own))
    if not isinstance(variable, str) or variable == KEY_VARIABLE:
        raise ValueError(
            f"{path} asks at {where}. Pass --endpoint {where} if your key may go there, or name the variable of "
            "another by api_key_env beside base_url."
        )
    return where, variable


def check_endpoint(endpoint: str) -> str:
    """The endpoint without a slash at its end. Raises `ValueError` if it is no URL, or could hold a secret."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search("[@;?#]", endpoint):
        raise ValueError(
            "The endpoint is no URL like http://localhost:8000/v1, without credentials, a query or a fragment."
        )
    return endpoint.rstrip("/")


def read_key(endpoint: str, named: str | None, own: str | None = None) -> str | None:
    """The key in an environment variable: the one that is named, else the judge's own, else `OPENAI_API_KEY`.

    Raises `ValueError` if there is none where one was named or OpenAI wants one, or no header can carry it.
    """
    variable = named or own or KEY_VARIABLE
    if not re.fullmatch(r"[A-Za-z_]\w*", variable):  # by mistake it may be the key itself
        raise ValueError(f"--api-key-env wants the name of an environment variable, such as {KEY_VARIABLE}.")
    key = os.environ.get(variable, "").strip()
    if not key and (named is not None or endpoint == OPENAI):
        raise ValueError(f"The environment variable {variable} is empty; put the key for {endpoint} into it.")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"The key in {variable} has a character that no HTTP header can carry.")
    return key or None
