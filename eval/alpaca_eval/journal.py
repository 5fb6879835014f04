"""What has been paid for or computed, one JSON object a line, on the disk before anything else happens.

A file that is written anew after every chunk, as the cache of `alpaca-eval` is, loses the chunk that was under way
and, if the process is killed while it writes, everything. A line that was cut off costs only itself.
"""

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of records; it is made with the first one. Several threads and processes may append."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All whole records, in the order of their appending."""
        records = []
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # an empty line, or one that a killed process left unfinished
        return [record for record in records if isinstance(record, dict)]

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record, which is on the disk when this returns; raises `OSError` if it cannot be."""
        line = json.dumps(record).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+", buffering=0) as file:
            # Behind an unfinished line, start a new one.
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            if file.write(line) != len(line):  # an unbuffered file says so instead of raising
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())
