"""Atomic writes of files and folders, and locks.

Files and folders are written to a temporary path next to the target, which is then renamed. If the process is killed,
the temporary path `.NAME.*.partial` remains. It is never read, and can be deleted.
"""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

LOCK = ".lock"


class FolderInUseError(RuntimeError):
    """Another process has locked a folder."""


def write_text(path: Path, text: str) -> None:
    """Writes a file and creates its parent folders. If an error occurs, `path` is not changed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As [`write_text`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # fails as well on a read-only disk, where the first error is to be shown
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def remove(path: Path) -> None:
    """Removes a file or folder if it exists. It is renamed first, so that it is never incomplete under its name."""
    if path.exists():
        partial = path.rename(_partial(path))
        shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder, and renames it to `path` if no error occurs.

    An empty folder at `path` is replaced. If another process has already written `path`, its folder is kept and the
    temporary one is removed.
    """
    path = path.resolve()
    with _folder_beside(path) as partial:
        yield partial
        try:
            os.rename(partial, path)
        except OSError:
            if not _is_nonempty(path):
                raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Context manager that yields the path of a temporary file, and renames it to `path` if no error occurs. For files
    too large for [`write_bytes`]. An existing file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def new_folders(*paths: Path) -> Iterator[list[Path]]:
    """Context manager that yields a temporary folder for each path, and renames them to `paths` if no error occurs.

    Either all of them are renamed or none. If the process is killed between the renames, the first ones remain. Empty
    folders at `paths` are replaced.

    Raises:
        ValueError: Two paths are the same, or one is inside another.
        FileExistsError: A path is a file or a folder that is not empty, before or after the block.
    """
    targets = [path.resolve() for path in paths]
    for (path, target), (other, other_target) in combinations(zip(paths, targets, strict=True), 2):
        if target.is_relative_to(other_target) or other_target.is_relative_to(target):
            raise ValueError(f"Output folders must not be the same or inside each other, got {path} and {other}.")
    for target in targets:
        _check_free(target)
    with ExitStack() as stack:
        partials = [stack.enter_context(_folder_beside(target)) for target in targets]
        yield partials
        with ExitStack() as undo:
            for target, partial in zip(targets, partials, strict=True):
                undo.callback(_undo_rename, target, partial, target.is_dir())
                try:
                    os.rename(partial, target)
                except OSError:
                    _check_free(target)
                    raise
            undo.pop_all()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that locks a folder, and creates it if necessary. The system unlocks it even if the process is
    killed.

    Raises:
        FolderInUseError: Another process has locked the folder. The message names it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(file, timeout=0))
        except Timeout:
            holder = file.read_text(encoding="utf-8").strip() or "another process"
            raise FolderInUseError(
                f"{folder} is in use by {holder}. Wait for it to end, or choose another folder."
            ) from None
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield


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
    # Random, since the id of a process is shared by its threads and can be reused.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _undo_rename(target: Path, partial: Path, existed: bool) -> None:
    if partial.exists():  # not renamed yet
        return
    os.rename(target, partial)
    if existed:
        target.mkdir()


def _check_free(path: Path) -> None:
    if _is_nonempty(path):
        raise FileExistsError(f"{path} exists and is not empty. Choose another folder or remove it.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file. Choose another folder or remove it.")


def _is_nonempty(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())
