"""The linter of imports sees every floor, also those whose folders lie outside that of the package."""

import re
import subprocess
import sys

import pytest
from checkout import CHECKOUT, copy_checkout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("source"))


def lint(source):
    """Exit status and output, without the line breaks."""
    command = [sys.executable, source / ".ci" / "lint_imports.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return result.returncode, re.sub(r"\s+", " ", result.stdout + result.stderr)


def test_every_module_imports_downwards(source):
    status, said = lint(source)
    assert status == 0, said
    assert "0 broken" in said


IN_A_FUNCTION = "def planted():\n    "


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("trl_steer/tasks/text.py", "from trl_steer.eval import benchmarks", "text -> trl_steer.eval.benchmarks"),
        ("trl_steer/tasks/text.py", "from ..tuners import post_block_steering", "text -> trl_steer.tuners"),
        (
            "trl_steer/trainers/callbacks.py",
            IN_A_FUNCTION + "from trl_steer.integrations.trl import sft",
            "callbacks -> trl_steer.integrations.trl.sft",
        ),
        (
            "trl_steer/__init__.py",
            IN_A_FUNCTION + "import trl_steer.eval.benchmarks.models",
            "trl_steer -> trl_steer.eval.benchmarks.models",
        ),
        (
            "trl_steer/__init__.py",
            "from trl_steer.integrations.trl.sft import main",
            "trl_steer -> trl_steer.integrations.trl.sft",
        ),
        ("trl_steer/cli.py", IN_A_FUNCTION + "import trl_steer.eval.runs", "trl_steer.cli -> trl_steer.eval.runs"),
        ("trl_steer/tuners/__init__.py", "from trl_steer import JointOrthSFTConfig", "trl_steer.tuners -> trl_steer "),
        (
            "trl_steer/tuners/steering/layer.py",
            IN_A_FUNCTION + "from ..post_block_steering import LowRankAdapter",
            "trl_steer.tuners.steering.layer -> trl_steer.tuners.post_block_steering",
        ),
        (
            "trl_steer/tuners/post_block_steering/layer.py",
            "from ..sublayer_steering import SublayerSteeringLayer",
            "trl_steer.tuners.post_block_steering.layer -> trl_steer.tuners.sublayer_steering",
        ),
        ("trl_steer/statistics.py", "from .files import read_json", "trl_steer.statistics -> trl_steer.files"),
        (
            "integrations/lm_eval/launcher.py",
            "from ...eval import alpaca_eval",
            "launcher -> trl_steer.eval.alpaca_eval",
        ),
    ],
)
def test_an_import_upwards_is_found_and_named(file, line, said, source):
    path = source / file
    before = path.read_text(encoding="utf-8")
    path.write_text(f"{before}\n\n{line}\n", encoding="utf-8")
    try:
        status, output = lint(source)
    finally:
        path.write_text(before, encoding="utf-8")
    assert status == 1, output
    assert said in output


def test_a_module_that_was_given_no_place_is_found_and_named(source):
    path = source / "trl_steer" / "newcomer.py"
    path.touch()
    try:
        status, output = lint(source)
    finally:
        path.unlink()
    assert status == 1, output
    assert "newcomer" in output


def test_the_core_names_no_tuner():
    tuners = CHECKOUT / "trl_steer" / "tuners"
    names = {folder.name for folder in tuners.iterdir() if (folder / "model.py").is_file()} - {"steering"}
    assert {"post_block_steering", "sublayer_steering", "joint_steering"} <= names
    words = re.compile(rf"\b(?:{'|'.join(names)})\b|lora|joint", re.IGNORECASE)
    files = list((tuners / "steering").rglob("*.py"))
    assert (tuners / "steering" / "layer.py") in files
    assert not {file.name: found for file in files if (found := words.findall(file.read_text(encoding="utf-8")))}
