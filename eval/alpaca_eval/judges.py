"""Which judge: those that the package ships, or one YAML file; which model and endpoint answer for it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_steer.files import write_text

from . import package

LEADERBOARD = "weighted_alpaca_eval_gpt4_turbo"
OPENAI = "https://api.openai.com/v1"
OPENAI_FUNCTION = "openai_completions"
KEY_VARIABLE = "OPENAI_API_KEY"
CONFIG = "configs.yaml"
# Without hyphens and underscores. Tokens are also what a model reads and writes, so not every one is meant.
_SECRET_SETTING = re.compile(
    r"apikey|authorization|secret|password|cookie|headers$|query$|^(?:api|auth|access|bearer|hf)?token$", re.IGNORECASE
)


class JudgeError(ValueError):
    """There is no such judge, or it cannot be used as it is described."""


@dataclass(frozen=True)
class Judge:
    """A judge and what answers for it.

    Attributes:
        name (`str`): What the package calls it.
        annotators (`dict[str, dict]`): Its configuration in the package's form, nearly always of one annotator, with
            prompts in place of the paths to them. Holds no endpoint and no key.
        endpoint (`str`, *optional*): Base URL of an OpenAI-compatible server; None for other providers.
        keys (`tuple[str, ...]`): Secrets. Never in `repr`, nor written anywhere.
        shipped (`bool`): Whether the package ships it with just these settings.
    """

    name: str
    annotators: dict[str, dict[str, Any]]
    endpoint: str | None
    keys: tuple[str, ...] = field(repr=False)
    shipped: bool

    @property
    def models(self) -> list[str]:
        settings = (annotator.get("completions_kwargs") or {} for annotator in self.annotators.values())
        return sorted({str(each.get("model_name", "unknown")) for each in settings})

    @property
    def label(self) -> str:
        """A name for folders, which tells judges with another model apart."""
        return self.name if self.shipped else _as_file_name(f"{self.name}--{'--'.join(self.models)}")

    @property
    def fingerprint(self) -> str:
        """Changes with everything that can change an answer: prompts, settings, models and endpoint."""
        identity = json.dumps([self.annotators, self.endpoint], sort_keys=True, default=str)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "models": self.models,
            "endpoint": self.endpoint,
            "shipped": self.shipped,
            "fingerprint": self.fingerprint,
        }

    def folder(self, cache: Path) -> Path:
        """Its own place in the cache."""
        return cache / _as_file_name(f"{self.name}--{'--'.join(self.models)}--{self.fingerprint}")

    def write(self, cache: Path) -> Path:
        """Writes the configuration where the package can read it, and returns its path."""
        folder, written = self.folder(cache), {}
        for number, (name, annotator) in enumerate(self.annotators.items()):
            prompt = folder / f"prompt{number}.txt"
            write_text(prompt, annotator["prompt_template"])
            # The package wants paths relative to the folder above that of the configuration.
            written[name] = {**annotator, "prompt_template": f"{folder.name}/{prompt.name}"}
        import yaml

        write_text(folder / CONFIG, yaml.safe_dump(written, sort_keys=False))
        return folder / CONFIG


def names() -> list[str]:
    """The judges that the package ships."""
    return sorted(config.parent.name for config in package.evaluators().glob(f"*/{CONFIG}"))


def resolve(
    judge: str, model: str | None = None, endpoint: str | None = None, key_variable: str | None = None
) -> Judge:
    """Finds a judge.

    Args:
        judge (`str`): Name of a judge of the package's, or path of a YAML file in the form of the package's
            `configs.yaml`. The file's prompt is a path relative to the file, or one of the package's.
        model (`str`, *optional*): Takes the place of the judge's model.
        endpoint (`str`, *optional*): Base URL of an OpenAI-compatible server. Otherwise the judge's own, else that of
            `OPENAI_BASE_URL`, else OpenAI's.
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): The environment variable with the key.

    Raises:
        JudgeError: if it does not exist, is not well formed, or there is no key for OpenAI's endpoint.
    """
    annotators, shipped = _read(judge)
    name = judge if shipped else Path(judge).stem if len(annotators) > 1 else next(iter(annotators))
    endpoints = {_take_endpoint(annotator, endpoint) for annotator in annotators.values()}
    if len(endpoints) > 1:
        raise JudgeError(
            f"the annotators of {judge} have several endpoints: {', '.join(sorted(map(str, endpoints)))}."
        )
    if model is not None:
        _set_model(judge, annotators, model)
    where = endpoints.pop()
    return Judge(name, annotators, where, keys(where, key_variable), shipped and model is None)


def _read(judge: str) -> tuple[dict[str, dict[str, Any]], bool]:
    shipped = judge in names()
    path = package.evaluators() / judge / CONFIG if shipped else Path(judge).expanduser()
    if not path.is_file():
        raise JudgeError(
            f"there is no judge {judge!r}. Give the path of a YAML file, or one of: {', '.join(names())}."
        )
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise JudgeError(f"{path} is not YAML: {error.reason}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # its text quotes the line, which may hold a key
        where = f" (line {mark.line + 1})" if mark else ""
        raise JudgeError(f"{path} is not YAML{where}.") from None
    if not isinstance(config, dict) or not all(isinstance(value, dict) for value in config.values()) or not config:
        raise JudgeError(f"{path} should map the judge's name to its settings, as the package's {CONFIG} files do.")
    for name, annotator in config.items():
        secret = _secret(annotator)
        if secret:
            raise JudgeError(
                f"{path} has {secret} under {name}, which may hold a key. Keys belong in an environment variable, "
                f"{KEY_VARIABLE} or the one that --api-key-env names."
            )
        annotator["prompt_template"] = _prompt(path, name, annotator.get("prompt_template"))
        _check_requests(path, name, annotator)
    return config, shipped


def _check_requests(path: Path, name: str, annotator: dict[str, Any]) -> None:
    """What is read of a judge's settings here; the rest is for the package to check."""
    settings = annotator.get("completions_kwargs") or {}
    client = settings.get("client_kwargs") or {} if isinstance(settings, Mapping) else {}
    if not isinstance(settings, Mapping) or not isinstance(client, Mapping):
        raise JudgeError(f"{path}: completions_kwargs of {name}, and client_kwargs in it, should be mappings.")
    if not isinstance(settings.get("model_name"), str) or not isinstance(client.get("base_url") or "", str):
        raise JudgeError(
            f"{path}: completions_kwargs of {name} should have a model_name, and it and base_url be text."
        )


def _secret(value: Any) -> str | None:
    """The name of what may hold a key in a judge's settings; headers and queries may."""
    if isinstance(value, Mapping):
        names = (str(name) for name in value if _SECRET_SETTING.search(re.sub(r"[-_\s]", "", str(name))))
        return next(names, None) or _secret(list(value.values()))
    if isinstance(value, list):
        return next((found for item in value if (found := _secret(item))), None)
    if isinstance(value, str) and re.search(r"://[^/\s]*@", value):
        return "a URL with credentials"
    return None


def _prompt(config: Path, name: str, given: Any) -> str:
    # The package itself would take a path that does not exist for the text of the prompt.
    for folder in (config.parent, config.parent.parent, package.evaluators()):
        if isinstance(given, str) and (folder / given).is_file():
            return (folder / given).read_text(encoding="utf-8")
    raise JudgeError(
        f"{config}: the prompt_template of {name}, {given!r}, is no file beside it and none of the package's. "
        "Expected for example: alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
    )


def _take_endpoint(annotator: dict[str, Any], given: str | None) -> str | None:
    """The endpoint of an annotator, taken out of its settings."""
    if annotator.get("fn_completions", OPENAI_FUNCTION) != OPENAI_FUNCTION:
        if given is not None:
            raise JudgeError(f"--endpoint was given, but this judge asks by {annotator['fn_completions']}.")
        return None
    settings = annotator["completions_kwargs"] = copy.deepcopy(annotator.get("completions_kwargs") or {})
    client = settings.pop("client_kwargs", None) or {}
    own = client.pop("base_url", None)
    if client:
        settings["client_kwargs"] = client
    from_environment = os.environ.get("OPENAI_API_BASE") or os.environ.get("OPENAI_BASE_URL")
    return check_endpoint(given or own or from_environment or OPENAI)


def check_endpoint(endpoint: str) -> str:
    """The endpoint without a slash at its end.

    Raises:
        JudgeError: if it is no URL, or carries a secret.
    """
    parts = urlsplit(endpoint)
    if "@" in endpoint or ";" in parts.path or parts.query or parts.fragment:
        raise JudgeError(
            "the endpoint's URL may not hold credentials, a query or a fragment, since it is written to result files."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        shown = f" {endpoint!r}" if "://" in endpoint else ""  # without a scheme it may be a key, by mistake
        raise JudgeError(f"the endpoint{shown} is no URL like http://localhost:8000/v1.")
    return endpoint.rstrip("/")


def _set_model(judge: str, annotators: dict[str, dict[str, Any]], model: str) -> None:
    if len(annotators) > 1:
        raise JudgeError(f"{judge} is a pool of {len(annotators)} annotators; another model cannot be chosen for it.")
    (annotator,) = annotators.values()
    settings = annotator["completions_kwargs"] = {**(annotator.get("completions_kwargs") or {}), "model_name": model}
    if annotator["prompt_template"].lstrip().startswith("<|im_start|>"):
        # Otherwise the package decides by the model's name whether it chats, and not by the prompt.
        settings["requires_chatml"] = True


def keys(endpoint: str | None, variable: str | None) -> tuple[str, ...]:
    """The keys in an environment variable, by default `OPENAI_API_KEY`; several are separated by commas.

    Raises:
        JudgeError: if there is none where one was named or is needed, or no header can carry it.
    """
    name = variable or KEY_VARIABLE
    found = tuple(part.strip() for part in os.environ.get(name, "").split(",") if part.strip())
    # By mistake it may be the key itself that was given, which is not to be shown.
    is_name = re.fullmatch(r"[A-Z][A-Z0-9_]*", name)
    shown = f"the environment variable {name if is_name else 'that --api-key-env names'}"
    if not found and (variable is not None or endpoint == OPENAI):
        raise JudgeError(f"{shown} is empty; it should hold the key.")
    if not all(part.isascii() and part.isprintable() for part in found):
        raise JudgeError(f"the key in {shown} has a character that no HTTP header can carry.")
    return found


def _as_file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)
