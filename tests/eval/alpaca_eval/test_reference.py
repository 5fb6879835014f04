"""The reference set: pinned, checked, and complete before it is used."""

import csv
import hashlib
import json

import alpaca_rows
import pytest
from huggingface_hub import constants

from trl_steer.eval.alpaca_eval import reference


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts files into an otherwise empty cache of the Hub, as if they had been fetched at the pinned revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / f"datasets--{reference.REPOSITORY.replace('/', '--')}"

    def put(folder):
        for name in (reference.BASELINE, reference.GAMED):
            content = (folder / name).read_bytes()
            # The large one by its SHA-256, the other as git names it: the Hub does both.
            digest = hashlib.sha256(content).hexdigest()
            if name == reference.GAMED:
                digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            blob = repository / "blobs" / digest
            link = repository / "snapshots" / reference.REVISION / name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.symlink_to(blob)

    return put


def test_files_of_the_pinned_revision_count_as_verified(cache, tmp_path):
    cache(alpaca_rows.write_reference(tmp_path / "files", reference.COUNT))
    loaded = reference.load()
    assert loaded.verified
    assert len(loaded.rows) == reference.COUNT
    assert loaded.describe()["revision"] == reference.REVISION


def test_reference_set_of_another_size_is_refused(cache, tmp_path):
    cache(alpaca_rows.write_reference(tmp_path / "files", 24))
    with pytest.raises(ValueError, match="must have 805 rows"):
        reference.load()


def test_local_reference_files_are_used_unchanged_and_not_called_verified(reference_folder):
    loaded = reference.load(reference_folder)
    assert not loaded.verified
    content = (reference_folder / reference.GAMED).read_bytes()
    assert loaded.sha256[reference.GAMED] == hashlib.sha256(content).hexdigest()


def test_unavailable_reference_files_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="Pass a folder with"):
        reference.load()


def spoil_columns(folder):
    rows = json.loads((folder / reference.BASELINE).read_text())
    del rows[3]["dataset"]
    (folder / reference.BASELINE).write_text(json.dumps(rows))


def spoil_order(folder):
    with (folder / reference.GAMED).open() as file:
        rows = list(csv.DictReader(file))
    rows[0], rows[1] = rows[1], rows[0]
    with (folder / reference.GAMED).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def spoil_table(folder):
    (folder / reference.GAMED).write_text("index,preference\n0,1\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_columns, "rows with instruction, output, generator, dataset"),
        (spoil_order, "in the same order"),
        (spoil_table, "must have the columns index, instruction_difficulty"),
        (lambda folder: (folder / reference.BASELINE).write_text("{"), "must have .* rows"),
        (lambda folder: (folder / reference.GAMED).unlink(), "Can't find df_gamed.csv"),
    ],
)
def test_invalid_reference_files_are_refused(tmp_path, spoil, said):
    folder = alpaca_rows.write_reference(tmp_path, 6)
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        reference.load(folder)
