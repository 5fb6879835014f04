"""The folder that an export writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_steer.files import new_folder, new_folders, remove


@contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Context manager that yields a temporary folder, and renames it to `path` if no error occurs.

    Args:
        path (`Path`): The folder.
        overwrite (`bool`): Whether to replace an existing folder, at the end.

    Raises:
        FileExistsError: `path` exists and is not empty, and `overwrite` is `False`.
    """
    if overwrite:
        with new_folder(path) as partial:
            yield partial
            remove(path)
    else:
        with new_folders(path) as (partial,):
            yield partial
