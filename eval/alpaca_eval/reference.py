"""The 805 instructions with the outputs they are compared to, and the table that length control needs.

Both are plain files of the Hub dataset repository, read at one revision. (Its dataset *script*, which `alpaca-eval`
loads by default, is no longer run by `datasets`; and it fetches the table only after every call of the judge is paid.)
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = "tatsu-lab/alpaca_eval"
REVISION = "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
BASELINE = "alpaca_eval_gpt4_baseline.json"
GAMED = "df_gamed.csv"
COUNT = 805

BASELINE_COLUMNS = ("instruction", "output", "generator", "dataset")
GAMED_COLUMNS = (
    "index",
    "instruction_difficulty",
    "std_delta_len",
    "preference",
    "not_gamed_baseline",
    "model",
)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class ReferenceSetError(ValueError):
    """The reference files cannot be had, or are not what they should be."""


@dataclass(frozen=True)
class Reference:
    """The reference set.

    Attributes:
        rows (`list[dict]`): In canonical order; a row's place in this list is its canonical index.
        folder (`Path`, *optional*): The local copy it was read from; None for the Hub.
        gamed (`Path`, *optional*): The table for length control, where it was asked for.
        sha256 (`dict[str, str]`): Checksums by file name.
        verified (`bool`): Whether the files are byte for byte those of the Hub at the pinned revision.
    """

    rows: list[dict[str, str]]
    folder: Path | None
    gamed: Path | None
    sha256: dict[str, str]
    verified: bool

    def describe(self) -> dict[str, Any]:
        return {
            "repository": REPOSITORY,
            "revision": REVISION if self.verified else None,
            "rows": len(self.rows),
            "sha256": self.sha256,
            "verified": self.verified,
        }


def load(folder: Path | None = None, with_gamed: bool = True) -> Reference:
    """Reads the reference set, from the Hub or from copies of its files.

    Args:
        folder (`Path`, *optional*): Holds copies of the files under their own names. Without it they are taken from
            the Hub at the pinned revision, or from the Hub's cache.
        with_gamed (`bool`, *optional*, defaults to `True`): Whether to get the table for length control too.

    Raises:
        ReferenceSetError: if a file is missing or damaged, is not the Hub's, or lacks rows or columns.
    """
    paths = {name: _find(name, folder) for name in (BASELINE, GAMED)[: 2 if with_gamed else 1]}
    expected = {name: _hub_digest(name, path, folder) for name, path in paths.items()}
    for name, digest in expected.items():
        if digest and digest != _digest(paths[name], len(digest)) and folder is None:
            raise ReferenceSetError(
                f"{paths[name]} is damaged: its checksum is not {digest}. Delete it and run again."
            )
    rows = _read_baseline(paths[BASELINE])
    if with_gamed:
        _check_gamed(paths[GAMED], len(rows))
    verified = all(digest == _digest(paths[name], len(digest or "")) for name, digest in expected.items())
    if verified and len(rows) != COUNT:
        raise ReferenceSetError(f"{paths[BASELINE]} has {len(rows)} rows, expected {COUNT}.")
    sha256 = {name: _digest(path, 64) for name, path in paths.items()}
    return Reference(rows, folder, paths.get(GAMED), sha256, verified)


def _find(name: str, folder: Path | None) -> Path:
    if folder is not None:
        if not (folder / name).is_file():
            raise ReferenceSetError(
                f"{folder} has no {name}; --reference wants copies of {BASELINE} and {GAMED} of the Hub dataset "
                f"{REPOSITORY} at revision {REVISION}."
            )
        return folder / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", revision=REVISION))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ReferenceSetError(
            f"{name} of {REPOSITORY} cannot be fetched ({type(error).__name__}). Without network access, name a "
            f"folder with copies of {BASELINE} and {GAMED} by --reference."
        ) from error


def _hub_digest(name: str, path: Path, folder: Path | None) -> str | None:
    """What the Hub says the file's checksum is: SHA-256 of a large file, else that of git. None where it is silent."""
    if folder is None:
        blob = path.resolve().name  # the cache names a file after its checksum
        return blob if _DIGEST.fullmatch(blob) else None
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError

    if constants.is_offline_mode():
        return None
    url = hf_hub_url(REPOSITORY, name, repo_type="dataset", revision=REVISION)
    try:
        etag = get_hf_file_metadata(url, timeout=5).etag
    except (HfHubHTTPError, FileMetadataError, OSError, RuntimeError):
        return None
    except Exception as error:  # the HTTP library's errors of connecting derive from Exception alone
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        return None
    return etag if etag and _DIGEST.fullmatch(etag) else None


def _digest(path: Path, length: int) -> str:
    content = path.read_bytes()
    if length == 40:
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return hashlib.sha256(content).hexdigest()


def _read_baseline(path: Path) -> list[dict[str, str]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReferenceSetError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ReferenceSetError(f"{path} should hold a list of rows, got {type(rows).__name__}.")
    for index, row in enumerate(rows):
        lacking = [name for name in BASELINE_COLUMNS if not isinstance(row.get(name), str)]
        if lacking:
            raise ReferenceSetError(f"row {index} of {path} lacks {', '.join(lacking)}.")
    if len({row["generator"] for row in rows}) != 1:
        raise ReferenceSetError(f"{path} should hold the outputs of one generator.")
    return rows


def _check_gamed(path: Path, count: int) -> None:
    import pandas

    table = pandas.read_csv(path)
    lacking = [name for name in GAMED_COLUMNS if name not in table]
    if lacking:
        raise ReferenceSetError(f"{path} lacks the columns {', '.join(lacking)}.")
    # The package takes a row's difficulty by its position in this table, so the two must not differ.
    first = table.drop_duplicates("index")["index"].rename_axis("position").reset_index()
    if first["position"].tolist() != list(range(count)) or first["index"].tolist() != list(range(count)):
        raise ReferenceSetError(
            f"{path} should begin with one row for each of the {count} rows of {BASELINE}, in their order."
        )
