"""`kill -9` at any moment of generating and judging: the next run ends with the undisturbed result."""

import random
import subprocess
import sys
import threading
import time

import alpaca_judging
import pytest
from loopback_judge import LoopbackJudge

from trl_steer.eval.alpaca_eval import cli

IN_FLIGHT = 2
BOTH = "import json, sys; from trl_steer.eval.alpaca_eval import cli; "
BOTH += "sys.exit(any(cli.main(arguments) for arguments in json.loads(sys.argv[1])))"


def commands(folder, reference_folder, url) -> list[list[str]]:
    shared = ["--reference", str(reference_folder), "--endpoint", url, "--in-flight", str(IN_FLIGHT)]
    generate = ["generate", "--model", "m", "--output", str(folder), *shared]
    judge = ["judge", str(folder), "--cache", str(folder / "cache"), "--output", str(folder / "judged"), "--yes"]
    return [generate, [*judge, *shared]]


def start(folder, reference_folder, url):
    import json

    return subprocess.Popen([sys.executable, "-c", BOTH, json.dumps(commands(folder, reference_folder, url))])


def results(folder) -> tuple:
    judgements = [(row["row"], row["preference"]) for row in alpaca_judging.annotations(folder)]
    numbers = alpaca_judging.numbers(alpaca_judging.result(folder))
    return (folder / "model_outputs.json").read_text(), judgements, numbers


@pytest.fixture(scope="module")
def undisturbed(reference_folder, tmp_path_factory):
    """What comes out where nothing happens, the seconds it takes, and the server, which is the same for all."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with LoopbackJudge(delay=0.02) as server:
        begun = time.monotonic()
        assert start(folder, reference_folder, server.url).wait(timeout=120) == 0
        yield results(folder), time.monotonic() - begun, server


def kill_and_go_on(moment, folder, reference_folder, server):
    """Kills a run after so many seconds, starts it again, and returns how often what was asked a second time."""
    before = server.asked.copy()
    process = start(folder, reference_folder, server.url)
    killer = threading.Timer(moment, process.kill)
    killer.start()
    process.wait(timeout=120)
    killer.cancel()
    assert not any(cli.main(arguments) for arguments in commands(folder, reference_folder, server.url))
    asked = server.asked - before
    return sum(count - 2 for count in asked.values() if count > 2)  # each row once to generate and once to judge


@pytest.mark.parametrize("part", [0.5, pytest.param(0.75, marks=pytest.mark.slow), 0.95])
def test_run_after_a_kill_gives_the_same_result(part, undisturbed, reference_folder, tmp_path):
    wanted, seconds, server = undisturbed
    assert kill_and_go_on(part * seconds, tmp_path / "run", reference_folder, server) <= IN_FLIGHT
    assert results(tmp_path / "run") == wanted


@pytest.mark.slow
def test_kill_at_50_random_times_gives_the_same_result(undisturbed, reference_folder, tmp_path):
    wanted, seconds, server = undisturbed
    draw = random.Random(0)
    for number in range(50):
        folder = tmp_path / str(number) / "run"
        assert kill_and_go_on(draw.uniform(0, 1.05) * seconds, folder, reference_folder, server) <= IN_FLIGHT
        assert results(folder) == wanted
