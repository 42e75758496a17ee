"""The option ``missing``: makes the resource of a key that has none, a new object each time.

Operations change it in place. If one object served twice, the operations of both keys would change it, and one that
raised could not be undone.
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
    """Check *missing*, and return what to call. With *rows*, all that it makes is mutable, hashable or not."""
    check_missing(missing)
    return Making(missing, rows=rows) if callable(missing) else "raise"


class Making:
    """Calls ``missing``, and refuses an object that it has returned before."""

    def __init__(self, missing: Callable[[Any], Any], *, rows: bool) -> None:
        """Wrap *missing*."""
        self.__wrapped__ = missing
        self._rows = rows
        # -- mutable state ---------------------------------------------------------------------------------
        self._last: Callable[[], Any] = lambda: None  # the last one made, while it is alive
        self._twice: dict[int, Any] = {}  # objects that were made twice, by `id`

    def __call__(self, key: Any) -> Any:
        """Make the resource of *key*. Raises a `TypeError` if it is the last one again."""
        made = self.__wrapped__(key)
        self.check(made, self._last(), key)
        self._last = _held(made)
        return made

    def check(self, made: object, other: object, key: object) -> None:
        """Raise a `TypeError` if *made*, for *key*, is the mutable *other*."""
        if (made is other or id(made) in self._twice) and (self._rows or not _is_value(made)):
            if len(self._twice) >= _MOST:
                self._twice.clear()
            self._twice[id(made)] = made  # even if another key's was made in between
            raise TypeError(
                f"missing returned the very same {type(made).__name__} for {shown(key)} that it had returned before, "
                "which operations change in place: each key would get the changes of the others. Let it make a new one "
                "each time it is called"
            )


def _is_value(made: Any) -> bool:
    """Return whether *made* is an immutable value, which all keys may share."""
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
    except TypeError:  # no weak references: a dict, say
        return lambda: made
