"""Files and folders that are either finished or not there: written beside their place, then renamed into it.

What a killed process leaves beside the place is called `.NAME.*.partial`. Nothing reads it, and the next attempt does
not mind it.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file, and the folders above it. After an error, `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # a read-only disk refuses this too, and the first error is the one to show
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there. It loses its name first, so that no half of it is taken for whole."""
    if path.exists():
        partial = path.rename(_partial(path))
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `path` when the block ends without an error.

    An empty folder at `path` is replaced. Where another process was faster, its folder stays and this one is thrown
    away.
    """
    path = path.resolve()
    with _folder_beside(path) as partial:
        yield partial
        try:
            os.rename(partial, path)
        except OSError:
            if not _is_taken(path):
                raise


@contextmanager
def new_folders(*paths: Path) -> Iterator[list[Path]]:
    """Gives a temporary folder for each path; when the block ends without an error, they become `paths`, or none does.

    Empty folders at `paths` are replaced. A process that is killed between the renames leaves the first ones in place.

    Raises:
        ValueError: before the block, if two paths are the same or one lies in the other.
        FileExistsError: before the block, if a path is a file or a folder that is not empty; after it, if one has
            become that in the meantime. Then, as after any other error, there is nothing new at any of the paths.
    """
    targets = [path.resolve() for path in paths]
    for (path, target), (other, other_target) in combinations(zip(paths, targets, strict=True), 2):
        if target.is_relative_to(other_target) or other_target.is_relative_to(target):
            raise ValueError(f"Each folder needs a place outside of the others, got {path} and {other}.")
    for target in targets:
        _check_free(target)
    with ExitStack() as stack:
        partials = [stack.enter_context(_folder_beside(target)) for target in targets]
        yield partials
        with ExitStack() as undo:
            for target, partial in zip(targets, partials, strict=True):
                undo.callback(_take_back, target, partial, target.is_dir())
                try:
                    os.rename(partial, target)
                except OSError:
                    _check_free(target)
                    raise
            undo.pop_all()


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    # Not by process: threads share one, and a number comes back after a while.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _take_back(target: Path, partial: Path, was_there: bool) -> None:
    if partial.exists():  # not renamed yet
        return
    os.rename(target, partial)
    if was_there:
        target.mkdir()


def _check_free(path: Path) -> None:
    if _is_taken(path):
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or remove it.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose another folder or remove it.")


def _is_taken(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
