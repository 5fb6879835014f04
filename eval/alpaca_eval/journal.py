"""What has been paid for or computed, one JSON object a line, on the disk before anything else happens.

A file that is written anew after every chunk, as the cache of `alpaca-eval` is, loses the chunk that was under way
and, if the process is killed while it writes, everything. A line that was cut off costs only itself.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of records. Several threads, and several processes, may append.

    Args:
        path (`Path`): The file; it and its folder are made when the first record is appended.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All whole records, in the order of their appending."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # an empty line, or one that a killed process left unfinished
        return [record for record in records if isinstance(record, dict)]

    def append(self, *records: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Writes the records, all in one piece; when this returns, they are on the disk.

        Returns:
            `list[dict]`: The records as they will be read. Half of a surrogate pair, which JSON can carry and a file
            cannot, is a question mark.

        Raises:
            OSError: if they cannot be written as a whole.
        """
        encoded = [json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") for record in records]
        lines = b"".join(line + b"\n" for line in encoded)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+", buffering=0) as file:
            # Behind an unfinished line, start a new one.
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                lines = lines if file.read(1) == b"\n" else b"\n" + lines
            if file.write(lines) != len(lines):  # an unbuffered file says so instead of raising
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())
        return [json.loads(line) for line in encoded]
