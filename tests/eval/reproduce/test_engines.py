"""A grid of 24 real cells with each engine. Whoever is killed, the record is that of an undisturbed study."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import study_cases
import tiny_runs

from trl_steer.eval.reproduce.results import CELLS, RUNNING, results
from trl_steer.eval.reproduce.study import save
from trl_steer.eval.runs import Run
from trl_steer.files import read_json

pytestmark = pytest.mark.slow
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed.")
ENGINES = ["local", pytest.param("ray", marks=needs_ray)]
OTHER = {"local": "ray", "ray": "local"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The file of the study."""
    folder = tmp_path_factory.mktemp("study")
    save(study_cases.grid(tiny_runs.save_checkpoint(folder / "model")), folder)
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def undisturbed(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(study, folder, "local")
    return folder


# As a shell starts it in the foreground: one in the background ignores Ctrl-C.
RUN = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
RUN += "from trl_steer import cli; sys.exit(cli.main())"


def command(study: Path, folder: Path, engine: str) -> list[str]:
    options = ["--output", str(folder), "--engine", engine, "--workers", "2"]
    return [sys.executable, "-c", RUN, "reproduce", str(study), *options]


# A cluster of its own, whatever else runs on this machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"}


def start(study: Path, folder: Path, engine: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(study, folder, engine), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def finish(study: Path, folder: Path, engine: str) -> str:
    ran = subprocess.run(command(study, folder, engine), capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "24 finished" in ran.stdout.splitlines()[-1]
    return ran.stdout


def started(folder: Path) -> dict[str, int]:
    """How often each finished cell was started."""
    logs = {path.parent.name: path.read_text(encoding="utf-8") for path in folder.glob(f"{CELLS}/*/log")}
    return {name: len(re.findall(r"^[\d-]+ [\d:]+ Model$", text, re.MULTILINE)) for name, text in logs.items()}


def record(folder: Path) -> dict:
    """All that a study leaves, except what depends on the machine and the hour."""
    varying = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    found = {}
    for result in results(folder):
        run = result.run
        weights = {path.name: path.read_bytes() for path in run.folder.glob("adapter/*.safetensors")}
        training = {name: value for name, value in run.training.items() if name not in varying}
        scores = {name: value for name, value in run.scores(result.cell.settings.task).items() if name not in varying}
        found[result.cell.key] = (run.settings, training, scores, weights, sorted(os.listdir(run.folder)))
    return found


def assert_is_like(undisturbed: Path, folder: Path) -> None:
    assert record(folder) == record(undisturbed)
    assert {path.name for path in (folder / CELLS).iterdir()} == set(record(undisturbed))
    assert not list((folder / RUNNING).iterdir())
    assert not (folder / "failed").exists()


def await_line(process: subprocess.Popen, text: str) -> None:
    """Reads what a process prints up to a line with a text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"The driver ended without {text!r}.")


def kill_a_worker(folder: Path) -> str:
    """Kills a worker while it makes a cell, and returns the name of the cell."""
    while True:
        for cell in (folder / RUNNING).iterdir():
            try:
                pid = int((cell / ".lock").read_text().split()[1])
                if "Training" in (cell / "log").read_text() and cell.is_dir():
                    os.kill(pid, signal.SIGKILL)
                    return cell.name
            except (FileNotFoundError, IndexError, ProcessLookupError):
                continue


@pytest.mark.parametrize("engine", ENGINES)
def test_no_cell_is_run_twice(engine, study, undisturbed, tmp_path):
    if engine == "local":
        folder = undisturbed
    else:
        folder = tmp_path
        finish(study, folder, engine)
        assert_is_like(undisturbed, folder)
    assert len(record(folder)) == 24
    assert {*started(folder).values()} == {1}
    before = {path: path.stat().st_mtime_ns for path in (folder / CELLS).rglob("*")}
    finish(study, folder, OTHER[engine] if importlib.util.find_spec("ray") else engine)
    assert {path: path.stat().st_mtime_ns for path in (folder / CELLS).rglob("*")} == before


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_worker_loses_only_its_current_cell(engine, study, undisturbed, tmp_path):
    with start(study, tmp_path, engine) as driver:
        await_line(driver, "3 of 24")
        killed = kill_a_worker(tmp_path)
        said = driver.stdout.read()
    assert driver.returncode == 0, said
    assert "will be tried again: The worker process" in said
    assert_is_like(undisturbed, tmp_path)
    counts = started(tmp_path)
    assert counts.pop(killed) == 2
    assert {*counts.values()} == {1}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_driver_is_continued_by_another_engine(engine, study, undisturbed, tmp_path):
    with start(study, tmp_path, engine) as driver:
        await_line(driver, "3 of 24")
        driver.kill()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / CELLS).iterdir()}
    assert 3 <= len(before) < 24
    finish(study, tmp_path, OTHER[engine] if importlib.util.find_spec("ray") else engine)
    assert_is_like(undisturbed, tmp_path)
    counts = started(tmp_path)
    assert {counts[name] for name in before} == {1}
    assert sorted(counts.values())[:-2] == [1] * 22
    assert max(counts.values()) <= 2


def test_two_drivers_do_not_share_a_folder(study, tmp_path):
    with start(study, tmp_path, "local") as driver:
        await_line(driver, "grid ...")
        second = subprocess.run(command(study, tmp_path, "local"), capture_output=True, text=True, env=ENVIRONMENT)
        driver.kill()
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == (
        f"trl-steer reproduce: error: {tmp_path} is in use by process {driver.pid} on {os.uname().nodename}. Wait for "
        "it to end, or choose another folder.\n"
    )


def test_ctrl_c_ends_all_workers_and_says_how_to_continue(study, tmp_path):
    with start(study, tmp_path, "local") as driver:
        await_line(driver, "3 of 24")
        driver.send_signal(signal.SIGINT)
        said = driver.stdout.read()
    assert driver.returncode == 130
    assert said.splitlines()[-1] == "trl-steer reproduce: stopped. The same command continues from there."
    assert "Traceback" not in said


def test_a_cell_that_diverges_is_recorded_and_stops_nothing(study, tmp_path):
    options = ["--rows", "SFT", "--seeds", "0", "--output", str(tmp_path), "--workers", "2"]
    text = study.read_text().replace("- 0.005", "- 1.0e+60")
    (tmp_path / "wild.yaml").write_text(text)
    main = [sys.executable, "-m", "trl_steer.cli", "reproduce", str(tmp_path / "wild.yaml"), *options]
    ran = subprocess.run(main, capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "grid: 3 finished, 1 diverged"
    (failed,) = (tmp_path / "failed").iterdir()
    assert read_json(failed) == {**read_json(failed), "attempts": 1, "diverged": True}
    assert [(result.accuracy is None, result.cell.rate) for result in results(tmp_path) if result.failure] == [
        (False, 1e60)
    ]


@needs_ray
def test_a_share_of_no_gpu_is_refused(study, tmp_path):
    main = [*command(study, tmp_path, "ray"), "--gpus", "0.5"]
    hidden = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}  # whatever this machine has
    ran = subprocess.run(main, capture_output=True, text=True, env=hidden)
    assert ran.returncode == 1
    (line,) = (line for line in ran.stderr.splitlines() if "error" in line)
    assert line.endswith("The Ray cluster has no GPU, of which each run would get 0.5. Leave --gpus out.")
    assert "Traceback" not in ran.stderr


def test_all_rows_of_table_1_run_at_a_tiny_size(tmp_path):
    options = ["--tiny", "--output", str(tmp_path), "--workers", "2"]
    main = [sys.executable, "-m", "trl_steer.cli", "reproduce", "table1", *options]
    ran = subprocess.run(main, capture_output=True, text=True, env=ENVIRONMENT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "table1: 24 finished"
    found = list(results(tmp_path))
    assert {result.cell.row for result in found if result.cell.stage == "test"} == {
        *("SFT", "LoRA r=8 (paper)", "LoRA r=8 (tuned)"),
        *("ReFT r=8 (last_prompt)", "ReFT r=8 (f7+l7)", "Ours r=8"),
    }
    assert all(isinstance(result.run, Run) for result in found)
