"""What makes the resource of a key at which there is none: a new one each time, which operations change in place.

The very same one twice would be changed by the operations of both keys; and an operation that raised could not be
undone in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import ref

from geventbatch._check_callables import check_missing
from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST: Final = 100


def checked(missing: Any, *, rows: bool = False) -> Literal["raise"] | Making:
    """Give *missing*, checked, as it is to be called. With *rows* all that it makes is changed, whatever its hash."""
    check_missing(missing)
    return Making(missing, rows=rows) if callable(missing) else "raise"


class Making:
    """Calls ``missing``, and refuses what it has made before."""

    def __init__(self, missing: Callable[[Any], Any], *, rows: bool) -> None:
        """Call *missing*."""
        self.__wrapped__ = missing
        self._rows = rows
        # -- mutable state ---------------------------------------------------------------------------------
        self._last: Callable[[], Any] = lambda: None  # what was made last, as long as there is such an object
        self._twice: dict[int, Any] = {}  # what was made twice, by its identity

    def __call__(self, key: Any) -> Any:
        """Make the resource of *key*. Raises a `TypeError` if it is the last one."""
        made = self.__wrapped__(key)
        self.check(made, self._last(), key)
        self._last = _held(made)
        return made

    def check(self, made: object, other: object, key: object) -> None:
        """Raise a `TypeError` if *made*, of *key*, is *other*, which operations change."""
        if (made is other or id(made) in self._twice) and (self._rows or not _is_value(made)):
            if len(self._twice) >= _MOST:
                self._twice.clear()
            self._twice[id(made)] = made  # another key's may come in between
            raise TypeError(
                f"missing gave the very same {type(made).__name__} for {shown(key)} that it had given before, which "
                "operations change in place: each key would have what was meant for the others. Let it make a new one "
                "each time it is called"
            )


def _is_value(made: Any) -> bool:
    """Whether nothing can be changed in it: then it may be the same one for all."""
    kind: Any = type(made)
    if kind is object or made is None:
        return True
    try:
        hash(made)
    except Exception:
        return False
    return kind.__hash__ is not object.__hash__


def _held(made: Any) -> Callable[[], Any]:
    try:
        return ref(made)
    except TypeError:  # a dict, say
        return lambda: made
