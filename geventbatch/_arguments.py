"""Arguments that are lists, dicts or sets: operations behind may change them, where they are in the resource by now.

So an operation that is applied again, because the batch is replayed or another one is undone, gets them as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._answer import Copying
from geventbatch._operation import attribute

if TYPE_CHECKING:
    from collections.abc import Callable


def repeatable(operation: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """Give what applies *operation* to *args* as they are now, however often; itself if nothing changes them.

    Only lists, dicts, sets and tuples are copied, as in answers.
    """
    try:
        kept = Copying().copy(args)
    except RecursionError:  # what lies so deep is passed as it is
        return operation
    return operation if kept is args else Repeatable(operation, kept)


class Repeatable:
    """An operation whose first application gets the arguments of its caller, and every other one a copy."""

    __slots__ = ("__wrapped__", "_applied", "_kept", "stands_for")

    def __init__(self, operation: Callable[..., Any], kept: tuple[Any, ...]) -> None:
        self.__wrapped__ = operation
        asked = attribute(operation, "stands_for")
        self.stands_for = operation if asked is None else asked
        self._kept = kept
        # -- mutable state ---------------------------------------------------------------------------------
        self._applied = False

    def __call__(self, resource: Any, *args: Any) -> Any:
        if self._applied:
            args = Copying().copy(self._kept)
        self._applied = True
        return self.__wrapped__(resource, *args)
