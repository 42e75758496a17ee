"""Answers: an operation's return value is copied for its caller, so that later operations do not change it.

A scope may have `copied(value)`, which returns a copy of a value that lies in a column of its resource, and any other
value as it is. This module is not compiled, since compiled code would not notice a recursion that goes too deep.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from types import AsyncGeneratorType
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import UUID

from geventbatch._check_callables import LAZY, close, goes_on
from geventbatch._core.operation import name_of
from geventbatch._safe_repr import shown
from geventbatch._watch import log

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation

PLAIN: Final = frozenset(
    {type(None), int, str, bool, float, bytes, complex, date, datetime, time, timedelta, Decimal, UUID}
)
"""Immutable types. Hardly any operation returns another one."""


class Unfinished(TypeError):
    """An operation has returned a value whose code has not run yet. Nothing of it is saved, even as a clean error."""


class TooDeep(RecursionError):
    """An operation has returned a value nested too deep to be copied. Nothing of it is saved, even as a clean error."""


def own_answer(attempt: Attempt, operation: Operation[Any], resource: Any, value: Any) -> Any:
    """Return *value* with copies of the lists, dicts and sets in it: later operations may change the originals.

    If it has another object of the batch in it, which cannot be copied, that is logged once.
    """
    copied: Any = getattr(attempt.scope, "copied", None)
    copying = Copying(None if copied is None else partial(attempt.context.run, copied))
    try:
        answer = copying.copy(value)
    except RecursionError:
        raise TooDeep(
            f"the operation on key {shown(attempt.batch.key)} returned lists or dicts that lie too deep in one another "
            "to be copied, and so nothing of it was saved"
        ) from None
    if copying.others:
        _refuse_unfinished(attempt.batch.key, operation.callable, copying.others)
        if not attempt.dispatcher.told_of_own:
            _tell_of_own(attempt, operation, resource, copying.others)
    return answer


def refuse_unfinished(key: Hashable, operation: object, value: Any) -> None:
    """Raise if *value*, which *operation* has returned, has anything in it whose code has not run yet."""
    _refuse_unfinished(key, operation, _others(value))


def unfinished(value: Any) -> str | None:
    """Name the part of *value* whose code has not run yet, and what to do about it; or None. Close coroutines."""
    kind = _unfinished(_others(value))
    return None if kind is None else f"{_called(kind)}: {_instead(kind)}"


def _others(value: Any) -> list[Any]:
    copying = Copying()
    with suppress(RecursionError):
        copying.copy(value)
    return copying.others


def _refuse_unfinished(key: Hashable, operation: object, values: list[Any]) -> None:
    kind = _unfinished(values)
    if kind is not None:
        raise Unfinished(
            f"the operation {name_of(operation)} on key {shown(key)} returned {_called(kind)}, and so nothing of it "
            f"was saved: {_instead(kind)}"
        )


def _unfinished(values: list[Any]) -> type | None:
    kinds = [type(one) for one in values if type(one) in LAZY or hasattr(type(one), "__await__") or goes_on(one)]
    if not kinds:
        return None
    for one in values:
        close(one)
    return kinds[0]


def _called(kind: type) -> str:
    name = kind.__name__.replace("_", " ")
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _instead(kind: type) -> str:
    if hasattr(kind, "__await__") or kind is AsyncGeneratorType:
        return (
            "it is never awaited, and its code has not run. Operations are plain functions: write def without async, "
            "and call without await what gevent has patched"
        )
    if kind not in LAZY:
        return (
            "what that does is not waited for, and a change of the resource would be lost. Let the operation do itself "
            "what changes the resource; and start all else when run() has returned"
        )
    return (
        "its code runs only when its caller reads it, and then on a resource that has gone on. Return a list of it; "
        "and if the operation was to change something, write it without yield"
    )


class Copying:
    """Copies nested containers, and values that the scope copies. Collects all other objects."""

    containers: ClassVar[frozenset[type]] = frozenset(
        {bytearray, Counter, defaultdict, deque, dict, list, OrderedDict, set, tuple}
    )

    def __init__(self, copied: Callable[[Any], Any] | None = None) -> None:
        self._copied = copied
        # -- mutable state ---------------------------------------------------------------------------------
        self.others: list[Any] = []
        self._copies: dict[int, Any] = {}  # by identity of the original
        self._given: list[Any] = []  # copies by the scope: they live on, so that no other object gets their identity

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        found = self._copies.get(id(value))
        if found is not None:
            return found
        if kind not in self.containers:
            return (
                self._copy_named(value)
                if hasattr(kind, "_make") and issubclass(kind, tuple)
                else self._copy_other(value)
            )
        return self._copy_tuple(value) if kind is tuple else self._copy_changeable(value)

    def _copy_other(self, value: Any) -> Any:
        copy = value
        if self._copied is not None:
            with suppress(Exception):  # of a class of the user's own: the value is answered as it is
                copy = self._copied(value)
        if copy is value:
            self.others.append(value)
        elif type(copy) in self.containers:  # a relationship's collection, as a list of its members
            self._given.append(copy)
            copy = self.copy(copy)
        return self._copies.setdefault(id(value), copy)

    def _copy_changeable(self, value: Any) -> Any:
        copy = self._copies[id(value)] = value.copy()
        kind = type(value)
        if kind is set:  # it can hold no container
            self.others += [one for one in copy if type(one) not in PLAIN]
        if kind is set or kind is bytearray:
            return copy
        for place, one in enumerate(value) if kind is list or kind is deque else value.items():
            if type(one) not in PLAIN:
                copy[place] = self.copy(one)
        return copy

    def _copy_named(self, value: Any) -> Any:
        parts = [self.copy(one) for one in value]
        if all(one is other for one, other in zip(parts, value, strict=True)):
            return self._copy_other(value)
        return self._copies.setdefault(id(value), type(value)._make(parts))

    def _copy_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        copy = tuple([self.copy(one) for one in value])
        if all(one is other for one, other in zip(copy, value, strict=True)):
            copy = value
        return self._copies.setdefault(id(value), copy)  # type: ignore[no-any-return] # one that holds itself is there


def _tell_of_own(attempt: Attempt, operation: Operation[Any], resource: Any, others: list[Any]) -> None:
    owns: Any = getattr(attempt.scope, "owns", None)
    for other in others:
        if other is resource or (owns is not None and _asked(attempt, owns, other)):
            attempt.dispatcher.told_of_own = True
            log.returned_own(attempt.batch, operation, type(other))
            return


def _asked(attempt: Attempt, owns: Any, value: Any) -> bool:
    try:
        return bool(attempt.context.run(owns, value))
    except Exception:
        return False
