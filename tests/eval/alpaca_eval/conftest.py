"""A reference set of 24 rows, a model's outputs for it, and a judge on this machine."""

from pathlib import Path

import alpaca_rows
import pytest
from loopback_judge import LoopbackJudge

KEY = "sk-loopback-5f0c2d1e9b7a4c3d"
COUNT = 24


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEYS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory) -> Path:
    return alpaca_rows.write_reference(tmp_path_factory.mktemp("reference"), COUNT)


@pytest.fixture
def outputs(reference_folder, tmp_path) -> Path:
    return alpaca_rows.write_outputs(
        tmp_path / "run" / "model_outputs.json", alpaca_rows.outputs_for(reference_folder)
    )


@pytest.fixture
def judge():
    with LoopbackJudge() as server:
        yield server
