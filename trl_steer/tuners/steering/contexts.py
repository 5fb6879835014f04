"""Values that a `with` block sets for the current thread or asyncio task."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Entry(Generic[T]):
    """A value in a [`ContextStack`]. Closed when it is removed, since copies of the context may still refer to it."""

    def __init__(self, value: T):
        self.value: T | None = value
        self.is_open = True


class ContextStack(Generic[T]):
    """
    The values set by the enclosing `with` blocks, innermost first.

    Other threads and tasks do not see them. Blocks may end in any order, as those of generators and tasks do: each
    removes its own value only. A new task inherits the values of its parent until the parent removes them.

    Args:
        name (`str`): Name of the context variable.
    """

    def __init__(self, name: str):
        self._entries: ContextVar[tuple[Entry[T], ...]] = ContextVar(name, default=())

    def __iter__(self) -> Iterator[T]:
        for entry in reversed(self._entries.get()):
            value = entry.value  # read first, because another thread may remove the entry before the check
            if entry.is_open and value is not None:
                yield value

    def has(self, entry: Entry[T]) -> bool:
        """Whether this entry was added in this context and is still open."""
        return entry.is_open and any(entry is other for other in self._entries.get())

    def innermost(self) -> Entry[T] | None:
        """The innermost open entry, if there is one."""
        return next((entry for entry in reversed(self._entries.get()) if entry.is_open), None)

    def push(self, value: T) -> Entry[T]:
        """Adds a value as the innermost."""
        entry = Entry(value)
        self._entries.set((*self._open(), entry))
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Removes an entry, also if it was added in another context: a generator may be closed by another task than
        the one that started it."""
        entry.is_open = False
        entry.value = None
        self._entries.set(self._open())

    def _open(self) -> tuple[Entry[T], ...]:
        return tuple(entry for entry in self._entries.get() if entry.is_open)
