"""The `trl-steer` command."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from trl_steer import cli


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert "usage: trl-steer" in capsys.readouterr().out


def test_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"trl-steer {version('trl-steer')}"


def test_unknown_command_exits_with_2_and_names_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    said = capsys.readouterr().err
    assert "'trian'" in said
    assert "demo" in said


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - {"lm-eval"}))
def test_help_of_a_command_is_that_of_its_own_parser(command):
    shown = subprocess.run(
        [sys.executable, "-m", "trl_steer.cli", command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith(f"usage: trl-steer {command}")


def test_lm_eval_gets_its_arguments_unchanged(capsys):
    argv = list(sys.argv)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["lm-eval", "run", "--help"])
    assert "--include_path" in capsys.readouterr().out
    assert sys.argv == argv


def test_tasks_prints_the_folder_of_the_lm_eval_tasks(capsys):
    assert cli.main(["tasks"]) == 0
    (folder,) = capsys.readouterr().out.splitlines()
    assert Path(folder, "steer", "steer_six.yaml").is_file()


# lm-eval builds its parser itself, and needs what it imports for that.
@pytest.mark.parametrize("command", [None, *sorted(cli.COMMANDS.keys() - {"lm-eval"})])
def test_asking_for_help_imports_nothing_heavy(command):
    argv = ["--help"] if command is None else [command, "--help"]
    code = f"""
import sys
from trl_steer.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print([name for name in ("torch", "transformers", "peft", "datasets", "trl") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"
