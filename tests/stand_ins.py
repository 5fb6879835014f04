"""What the commands of the documentation do in the tests, and what stands in for the Hub: the working directory.

`trl-steer` and `lm_eval` are themselves. The others are read and checked, and do nothing: `accelerate launch` of our
module needs several GPUs, `pip` needs a network, and `make test` would run the tests that run it.
"""

import argparse
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

# Folders of lm-eval, for the tasks of its own that the pages name.
LM_EVALS_TASKS = ("arc",)


def trl_steer(arguments: list[str], checkout: Path) -> int:
    from trl_steer import cli

    return cli.main(arguments)


def lm_eval(arguments: list[str], checkout: Path) -> int | None:
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    return cli_evaluate()


def find_few_tasks() -> None:
    """Of lm-eval's own tasks these alone: it reads thousands of files to find all, which takes seconds each time."""
    from lm_eval.tasks import _index

    own, build = Path(_index.__file__).parent, _index.TaskIndex.build

    def build_few(paths, **kwargs):
        few = [[path] if path != own else [own / name for name in LM_EVALS_TASKS] for path in paths]
        return build([path for part in few for path in part], **kwargs)

    _index.TaskIndex.build = staticmethod(build_few)


def accelerate(arguments: list[str], checkout: Path) -> int:
    """Reads the arguments as the launcher does. Runs a script in this process, and our module with `--dry_run`."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    from trl_steer.integrations.trl import sft

    assert arguments[0] == "launch"
    parsed = launch_command_parser().parse_args(arguments[1:])
    if not parsed.module:
        sys.argv = [parsed.training_script, *parsed.training_script_args]
        runpy.run_path(parsed.training_script, run_name="__main__")
        return 0
    load_config_from_file(parsed.config_file)
    assert importlib.util.find_spec(parsed.training_script) is not None
    return sft.main([*parsed.training_script_args, "--dry_run"])


def pip(arguments: list[str], checkout: Path) -> int:
    """Looks whether the project has the extras that are asked for; installs nothing."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    for word in arguments[1:]:
        found = re.fullmatch(r"(\.|trl-steer)(?:\[([\w,]+)\])?", word)
        assert found, word
        for extra in (found[2] or "").split(","):
            assert not extra or extra in project["optional-dependencies"], extra
    return 0


def git(arguments: list[str], checkout: Path) -> int:
    """Finds no repository. lm-eval asks for it."""
    return 1


def lay_out_checkout(folder: Path, checkout: Path) -> None:
    """Gives a folder the files that `make` reads, and an empty environment, as if `make` had created it."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(checkout / name, folder)


def make(arguments: list[str], checkout: Path) -> int:
    """Says what would be done."""
    found = shutil.which("make", path="/usr/bin:/bin")
    if found is not None:
        return subprocess.run([found, "--dry-run", *arguments], check=False).returncode
    targets = re.findall(r"^(\w+):", Path("Makefile").read_text(), re.MULTILINE)
    return int(not set(arguments) <= set(targets))


def replace_the_hub(set_attribute: Callable = setattr) -> None:
    """What is pushed to `USER/name` becomes the folder `USER/name`, where every library looks before the Hub."""
    from huggingface_hub import HfApi

    def create_repo(self, repo_id, **kwargs):
        return argparse.Namespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            target = Path(repo_id, operation.path_in_repo)
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, repo_id, dirs_exist_ok=True)

    for function in (create_repo, create_commit, upload_folder):
        set_attribute(HfApi, function.__name__, function)
