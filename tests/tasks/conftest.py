"""Where the tests of the tasks find rows: a folder of written ones, and the mirror of the real datasets."""

import os
from pathlib import Path

import datasets
import pytest
import task_rows

MIRROR = "TRL_STEER_HUB_MIRROR"


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_separate(tmp_path_factory):
    """No bars in the output, and nothing left in the user's cache."""
    datasets.disable_progress_bars()
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def written_hub(tmp_path_factory) -> Path:
    return task_rows.write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(written_hub, monkeypatch) -> Path:
    """A folder laid out like the Hub, with a few written rows of each dataset, as the working directory."""
    for variable in (MIRROR, "TRL_STEER_DATASETS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(written_hub)
    return written_hub


@pytest.fixture
def mirror(monkeypatch) -> Path:
    """The mirror of the real datasets as the working directory."""
    folder = os.environ.get(MIRROR)
    if not folder:
        pytest.skip(f"{MIRROR} is not set; it names a folder with copies of the six datasets")
    for variable in (MIRROR, "TRL_STEER_DATASETS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(folder)
    return Path(folder)
