"""The command line: quick to help, the cheap checks first, and one line about whatever goes wrong."""

import signal
import subprocess
import sys

import pytest
from loopback_judge import LoopbackJudge

from trl_steer.eval.alpaca_eval import cli

HEAVY = ("torch", "transformers", "peft", "openai", "pandas", "alpaca_eval", "huggingface_hub", "yaml")
LISTS_HEAVY = f"""
import sys
from trl_steer.cli import main
try:
    main(["alpaca-eval", *sys.argv[1:]])
except SystemExit as left:
    print("left", left.code, [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["judge", "--help"], 0),
        (["judge", "run", "--retries", "-1"], 2),
        (["generate", "--model", "m"], 2),
    ],
)
def test_help_and_refusals_import_nothing_heavy(arguments, status):
    ran = subprocess.run([sys.executable, "-c", LISTS_HEAVY, *arguments], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == f"left {status} []"


@pytest.mark.parametrize("command", ["generate", "judge"])
def test_help_shows_defaults(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    for default in ("(default: 8)", "(default: 120.0)", "(default: True)", "<think>"):
        assert default in shown
    assert "None" not in shown


def test_the_folder_is_looked_for_before_the_key(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert cli.main(["judge", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_a_submission_looks_for_its_folder_before_the_reference_files(tmp_path, capsys):
    arguments = [str(tmp_path), "--output", str(tmp_path / "new"), "--reference", str(tmp_path / "nowhere")]
    assert cli.main(["submit", *arguments]) == 2
    assert "Pass a folder written by `judge`" in capsys.readouterr().err


def test_an_interruption_says_what_is_kept_and_how_to_go_on(reference_folder, tmp_path):
    with LoopbackJudge(lambda number, instruction: "500" if number >= 6 else None) as server:
        arguments = ["--model", "m", "--reference", str(reference_folder), "--output", str(tmp_path / "run")]
        arguments = ["generate", *arguments, "--endpoint", server.url, "--retries", "60"]
        # A shell starts what runs in its background, tests perhaps, without an ear for interrupts.
        run = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        run += "from trl_steer.eval.alpaca_eval import cli; sys.exit(cli.main(sys.argv[1:]))"
        process = subprocess.Popen([sys.executable, "-c", run, *arguments], stderr=subprocess.PIPE, text=True)
        while server.requests < 12:
            assert process.poll() is None
            server.stopping.wait(0.02)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    said = f"Interrupted. Finished rows are kept in {tmp_path / 'run'}. Run the same command again to continue."
    assert shown.strip().splitlines() == [f"trl-steer alpaca-eval generate: {said}"]
