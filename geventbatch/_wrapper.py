"""One object around another: between a processor and its store, or between a batch and its scope."""

from __future__ import annotations

from typing import Any


class Around:
    """Is whatever the other one is, but for what a subclass makes of it: a store may normalise keys, say."""

    def __init__(self, inner: Any) -> None:
        """Wrap *inner*."""
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        """Have what the other one has."""
        return getattr(self._inner, name)


def innermost(given: Any) -> Any:
    """Give what stands inside of all that are around it."""
    while isinstance(given, Around):
        given = given._inner  # noqa: SLF001 - its own
    return given
