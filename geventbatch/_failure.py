"""The failure of a batch as a whole, kept once. Each of its callers makes an exception of its own from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Final

from geventbatch._safe_repr import shown
from geventbatch.errors import (
    BatchAborted,
    BatchTimeout,
    LoadFailed,
    NotSaved,
    Phase,
    ResourceMissing,
    SaveFailed,
    named,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

_NOTHING = "nothing was saved, it is safe to run the operation again"
_UNKNOWN = "it is unknown whether anything was saved: look at the resource before you run the operation again"


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of every operation of a failed batch."""

    kind: type[BatchAborted]
    key: Hashable
    what: str
    cause: BaseException
    retry_safe: bool
    phase: Phase | None = None
    behind: frozenset[object] = frozenset()  # operations of later parts of the batch, which were not being saved
    keys: tuple[Hashable, ...] = ()  # all keys of the operation; empty if *key* is the only one

    def of(self, operation: object) -> Failure:
        """Return the outcome of *operation*: of those behind, certainly nothing was saved."""
        if operation not in self.behind:
            return self
        what = f"the operation was behind those that were being saved: {self.what}"
        is_save = self.kind is SaveFailed
        cause = not_saved(self.cause, "it was not being saved yet when the save failed") if is_save else self.cause
        phase: Phase | None = None if self.phase is None else "operations"
        return replace(self, what=what, cause=cause, retry_safe=True, phase=phase)

    def in_parts(self, parts: Sequence[Iterable[object]] | None) -> Failure:
        """Return the failure of a batch that was saved in *parts*, the last one of which was at hand."""
        if self.retry_safe or not parts:
            return self
        return replace(self, behind=frozenset(chain(*parts[:-1])))

    def exception(self) -> BatchAborted:
        """Return a new exception, for one caller."""
        message = (
            f"batch of {named(self.keys or (self.key,))}: {self.what}; {_NOTHING if self.retry_safe else _UNKNOWN}"
        )
        if self.phase is None:
            error = self.kind(message, key=self.key, retry_safe=self.retry_safe)
        else:
            error = BatchTimeout(message, key=self.key, retry_safe=self.retry_safe, phase=self.phase)
        error.keys = self.keys or (self.key,)
        error.__cause__ = self.cause
        return error


def load_failed(key: Hashable, cause: BaseException, why: str = "") -> Failure:
    """Return the failure of a load that raised *cause*."""
    kind = ResourceMissing if isinstance(cause, ResourceMissing) else LoadFailed
    return Failure(kind, key, f"loading raised {shown(cause)}{why}", cause, retry_safe=True)


def save_failed(key: Hashable, cause: BaseException, why: str = "", doing: str = "saving") -> Failure:
    """Return the failure of a save that raised *cause*, or of another step (*doing*) that kept it from being saved."""
    return Failure(
        SaveFailed, key, f"{doing} raised {shown(cause)}{why}", cause, retry_safe=isinstance(cause, NotSaved)
    )


def not_saved(error: BaseException, why: str) -> NotSaved:
    """Return *error* as a `NotSaved`, for the reason *why*."""
    if isinstance(error, NotSaved):
        return error
    certain = NotSaved(f"{why}: {shown(error)}")
    certain.__cause__ = error
    return certain


def rejected(error: NotSaved) -> BaseException:
    """Return the store's own error in *error*, for the caller of the culprit."""
    return error if error.__cause__ is None else error.__cause__


_HELD: Final = (
    "Callers that have used the database before run() hold one each while they wait: let them close their session, or "
    "their connection, before; or "
)
_POOLS: Final = {
    # SQLAlchemy's pool opens a connection in the greenlet that needs it; only where there is none to open does it wait.
    "/sqlalchemy/util/queue.py:": (
        "All connections of the pool were in use, or being opened. " + _HELD + "give the store an engine of its own"
    ),
    # psycopg's pool, which may be Django's, opens them in the background, and says so in its own log if it cannot.
    " in WaitingClient.wait": (
        "The pool gave no connection. If the logger psycopg.pool says 'error connecting' at that time, the server was "
        "down, full or out of reach, and the line says which. If not, all connections were in use. "
        + _HELD
        + 'raise max_size (Django: in OPTIONS["pool"])'
    ),
}
"""What to say, by a part of the frame in which code waits for a connection of a pool."""


_LATE: Final = 0.1
"""Seconds. A timer of the hub rings later than that only if the hub was held."""


def timed_out(key: Hashable, phase: Phase, seconds: float, stack: tuple[str, ...], late: float = 0.0) -> Failure:
    """Return the failure of a batch whose deadline passed while its code waited in *stack*.

    The hub noticed it *late*, by so many seconds.
    """
    doing = {"load": "loading", "operations": "applying its operations", "save": "saving"}[phase]
    what = f"max_duration of {seconds:g} s passed while it was {doing}"
    if late > _LATE:
        what += (
            f" (noticed {late:.1f} s late: something held the hub, of this or another key, or no CPU was free; a line "
            '"kept the hub" names each place once)'
        )
    cause = TimeoutError(what)
    if stack:
        cause.add_note("\n  ".join(("its code waited there, the innermost frame last:", *stack)))
        for mark, said in _POOLS.items():
            if any(mark in frame for frame in stack):
                cause.add_note(said)
    return Failure(BatchTimeout, key, what, cause, retry_safe=phase != "save", phase=phase)


def aborted(key: Hashable, cause: BaseException, *, saving: bool) -> Failure:
    """Return the failure of a batch whose worker, or one of whose operations, was killed by *cause*."""
    return Failure(BatchAborted, key, f"killed by {shown(cause)}", cause, retry_safe=not saving)
