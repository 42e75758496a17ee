"""One object around another: between a processor and its store, or between a batch and its scope."""

from __future__ import annotations

from typing import Any


class Around:
    """Forward every attribute of the object inside, such as a store's ``normalize_key``. A subclass may change some."""

    def __init__(self, inner: Any) -> None:
        """Wrap *inner*."""
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the object inside."""
        return getattr(self._inner, name)


def innermost(given: Any) -> Any:
    """Return the object inside of all wrappers."""
    while isinstance(given, Around):
        given = given._inner  # noqa: SLF001 - of this module
    return given
