"""An operation: a callable, its caller's context, and its outcome."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context


T = TypeVar("T")

WAITING: Final = 0
"""Admitted, and not applied yet."""

STARTED: Final = 1
"""Applied at least once. From here on its batch goes on whether or not its caller is still there."""

WITHDRAWN: Final = 2
"""Its caller left before it started: it never runs."""

BROKEN: Final = 3
"""It raised half-way and stays out of every later attempt (guarantee 18)."""

SETTLED: Final = 4
"""Its part of the batch has ended: its own outcome counts, whatever happens to the rest of the batch."""


WAS_STARTED: Final = frozenset({STARTED, BROKEN, SETTLED})
"""The states of an operation that has been applied."""

_DEEPEST: Final = 100
"""Wrappers to look through at the most: a mock returns a wrapper for ever."""


class Operation(Generic[T]):
    """One `run` of one caller. `run` fills it in: an ``__init__`` would cost as much as all the rest of admitting."""

    __slots__ = ("args", "callable", "context", "error", "group", "state", "value")

    callable: Callable[..., T]
    """The user's function *f* in its wrappers: ``Start(Once(Repeatable(InBatch(f))))``, or fewer of them. Nothing but
    `Start` may be around `Once`, since `once_of` looks for it there."""
    args: tuple[Any, ...]
    context: Context  # of its caller, at `run`
    # -- mutable state -------------------------------------------------------------------------------------
    group: Any  # an `AsyncResult` that wakes its caller, and those of up to 31 operations beside it in its batch
    state: int  # WAITING to SETTLED
    value: T  # its answer in the last attempt; unset until it has returned
    error: BaseException | None  # its error in the last attempt

    read_only = False

    def answer(self) -> T:
        """Return the operation's answer, or raise its error."""
        error, self.error = self.error, None  # the traceback refers to this operation: no cycle through the error
        if error is None:
            return self.value
        try:
            raise error
        finally:
            del error


class ReadOnly(Operation[T]):
    """An operation that changes nothing: a batch of nothing else is not saved."""

    __slots__ = ()
    read_only = True


def common_name(operations: list[Operation[Any]]) -> str | None:
    """Return the qualified name that *operations* share, or None if they have more than one."""
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
    """Return the qualified name of *function*, or of its class; for a partial or wrapper, of the function inside."""
    function = unwrapped(function)
    name = attribute(function, "__qualname__")
    return name if isinstance(name, str) and name else type(function).__qualname__


def unwrapped(function: Any) -> Any:
    """Return the innermost function of *function*, if it is a partial or a wrapper."""
    for _ in range(_DEEPEST):
        inner = function.func if isinstance(function, partial) else attribute(function, "__wrapped__")
        if inner is None:
            break
        function = inner
    return function


def attribute(function: Any, name: str) -> Any:
    """Return the attribute *name* of *function*, or None. A ``__getattr__`` of the user's that raises ends no batch."""
    try:
        return getattr(function, name, None)
    except Exception:
        return None
