"""An operation: a callable, its caller's context, and what came of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from gevent.event import AsyncResult

T = TypeVar("T")

WAITING: Final = 0
"""Admitted, and never applied so far."""

STARTED: Final = 1
"""Applied at least once. From here on its batch goes on whether or not its caller is still there."""

WITHDRAWN: Final = 2
"""Its caller left before it started: it never runs."""

BROKEN: Final = 3
"""It raised half-way and stays out of every later attempt (guarantee 18)."""

SETTLED: Final = 4
"""Its part of the batch has its outcome, whatever becomes of the rest: its own is what counts."""


_DEEPEST: Final = 100
"""Wrappers that are looked through: a stand-in for anything gives itself, or another, for ever."""


class Operation(Generic[T]):
    """One `run` of one caller, which fills it in: an ``__init__`` would cost each operation as much as all the rest."""

    __slots__ = ("args", "callable", "context", "error", "group", "state", "value")

    callable: Callable[..., T]
    args: tuple[Any, ...]
    context: Context  # of its caller, at `run`
    # -- mutable state -------------------------------------------------------------------------------------
    group: AsyncResult[None]  # wakes its caller, and those of up to 31 operations beside it in its batch
    state: int
    value: T  # what it returned, in the last attempt, once it has
    error: BaseException | None  # what it raised, in the last attempt

    read_only = False

    def answer(self) -> T:
        """Return what it returned, or raise what it raised."""
        error, self.error = self.error, None  # the traceback to come holds this operation: no cycle through the error
        if error is None:
            return self.value
        try:
            raise error
        finally:
            del error


class ReadOnly(Operation[T]):
    """One that changes nothing: for its sake alone a batch is not saved."""

    __slots__ = ()
    read_only = True


def common_name(operations: list[Operation[Any]]) -> str | None:
    """The qualified name that *operations* share; None when they have more than one."""
    names: set[str] = set()
    last: object = None
    for operation in operations:
        if operation.callable is not last:
            last = operation.callable
            names.add(name_of(last))
            if len(names) > 1:
                return None
    return names.pop() if names else None


def name_of(function: Any) -> str:
    """The qualified name of *function*, or of its class; of what a partial or a wrapper calls."""
    function = unwrapped(function)
    name = attribute(function, "__qualname__")
    return name if isinstance(name, str) and name else type(function).__qualname__


def unwrapped(function: Any) -> Any:
    """What *function* calls in the end, if it is a partial or a wrapper."""
    for _ in range(_DEEPEST):
        inner = function.func if isinstance(function, partial) else attribute(function, "__wrapped__")
        if inner is None:
            break
        function = inner
    return function


def attribute(function: Any, name: str) -> Any:
    """Give its attribute, or None: whatever a ``__getattr__`` of the user's raises, no batch ends of it."""
    try:
        return getattr(function, name, None)
    except Exception:
        return None
