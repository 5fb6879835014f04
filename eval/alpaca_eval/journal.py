"""A JSON Lines file of answers that have been paid for or computed, each of them written to disk at once.

Unlike the cache of `alpaca-eval`, which is rewritten after every chunk, it loses at most the last record if the
process is killed.
"""

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of records, created with the first one. Several threads and processes may append."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All complete records, in order."""
        records = []
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # an empty line, or an incomplete one of a killed process
        return [record for record in records if isinstance(record, dict)]

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends a record and flushes it to disk."""
        line = json.dumps(record).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+", buffering=0) as file:
            # Start a new line after an incomplete one.
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            if file.write(line) != len(line):  # an unbuffered file does not raise an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())
