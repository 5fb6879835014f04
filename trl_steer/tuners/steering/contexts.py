"""Values that a `with` block sets for the thread or task that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")


class Entry(Generic[T]):
    """A value in force until it is removed, and `None` from then on, since other contexts may still hold this."""

    def __init__(self, value: T):
        self.value: T | None = value
        self.is_open = True


class ContextStack(Generic[T]):
    """
    The values that the `with` blocks around a piece of code have set, innermost first.

    Other threads and tasks do not see them, and blocks may end in any order, as those of generators and tasks do: each
    takes out its own value and no other. A task inherits what was in force when it was made, for as long as it is.

    Args:
        name (`str`): Name of the context variable.
    """

    def __init__(self, name: str):
        self._entries: ContextVar[tuple[Entry[T], ...]] = ContextVar(name, default=())

    def __iter__(self) -> Iterator[T]:
        for entry in reversed(self._entries.get()):
            value = entry.value  # before the look, because another thread may remove it in between
            if entry.is_open and value is not None:
                yield value

    def has(self, entry: Entry[T]) -> bool:
        """Whether a value has been added here and is still in force."""
        return entry.is_open and any(entry is other for other in self._entries.get())

    def innermost(self) -> Entry[T] | None:
        """The value in force, if there is one."""
        return next((entry for entry in reversed(self._entries.get()) if entry.is_open), None)

    def push(self, value: T) -> Entry[T]:
        """Adds a value as the innermost."""
        entry = Entry(value)
        self._entries.set((*self._open(), entry))
        return entry

    def remove(self, entry: Entry[T]) -> None:
        """Takes a value out again, also from other contexts, for example where a generator is closed by another task
        than the one that ran it."""
        entry.is_open = False
        entry.value = None
        self._entries.set(self._open())

    def _open(self) -> tuple[Entry[T], ...]:
        return tuple(entry for entry in self._entries.get() if entry.is_open)
