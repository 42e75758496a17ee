"""The outcome of a save whose COMMIT raised: the one place, for all SQL stores, that decides what callers are told.

| what this side knows of COMMIT         | the error                       | is                                       |
|----------------------------------------|---------------------------------|------------------------------------------|
| the server has confirmed it            | any: of a listener, a hook      | saved, and logged                        |
| not sent, or not carried out           | any                             | what it is before COMMIT: not saved      |
| nothing                                | the server's own answer         | not saved                                |
| nothing                                | any other; asked: committed     | saved                                    |
|                                        | … aborted                       | not saved: replayed                      |
|                                        | … unknown, or no answer         | the error itself: unknown                |
"""

from __future__ import annotations

from random import random
from typing import TYPE_CHECKING, Final

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._safe_repr import shown
from geventbatch._watch import log
from geventbatch.errors import Conflict, NotSaved
from geventbatch.stores._sql import bounds, errors

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator


_LONGEST_POLL: Final = 0.05
"""Seconds between two looks at what became of a COMMIT, or at a busy SQLite."""


def resolve(
    error: Exception,
    key: Hashable,
    *,
    told: bool | None,
    ask: Callable[[], bool | None],
    not_saved: Callable[[Exception], NotSaved] | None = None,
) -> None:
    """Return if COMMIT was carried out although *error* came out of it, or out of a hook after it; else raise.

    Args:
        error: The exception, raised as early as in building the statement before COMMIT.
        key: The resource's key.
        told: What this side knows of COMMIT. True: the server has confirmed it. False: it was not sent, or not carried
            out. None: only the error tells, or the server.
        ask: Asks the server what became of the transaction; None if it does not know, or cannot be asked in time.
        not_saved: Returns what to raise for *error* if nothing was written; `errors.not_saved` unless given.

    Raises:
        NotSaved: Certainly nothing was written.
        Exception: *error* itself, if the outcome is unknown.
    Switches: as *ask* does.
    """
    if told:
        _tell_of_hook(error, key)
        return
    if isinstance(error, NotSaved):
        raise error
    if told is False:
        raise _raised(not_saved, error, key) from error
    if errors.of_commit(error, key) is not None:
        raise _raised(not_saved, error, key) from error
    committed = ask()
    if committed is None:
        raise error
    if not committed:
        raise Conflict(
            f"{shown(key)} was not saved: the connection was lost in COMMIT, which was not carried out"
        ) from error
    if errors.kind(error) is not errors.Kind.LOST:
        _tell_of_hook(error, key)


def _raised(not_saved: Callable[[Exception], NotSaved] | None, error: Exception, key: Hashable) -> NotSaved:
    return errors.not_saved(error, key) if not_saved is None else not_saved(error)


def _tell_of_hook(error: Exception, key: Hashable) -> None:
    told = "what is called after COMMIT raised, for the batch of key %s, which was saved: %s"
    log.error(told, key, error, error=error)


def postgres_fate(xid: str, once: Callable[[str], str | None], seconds: float) -> bool | None:
    """Ask PostgreSQL until it knows whether a transaction was committed. None: no answer within *seconds*.

    Args:
        xid: The transaction's id, from `bounds.postgres_bound_and_xid`.
        once: Sends a query on another connection, and returns the answer; `NO_ANSWER` if the server could not be asked.
        seconds: How long to go on asking.
    Switches: yes.
    """
    question = bounds.postgres_outcome(xid)
    for _ in polls(seconds):
        answer = once(question)
        if answer not in {"in progress", NO_ANSWER}:
            return None if answer is None else answer == "committed"
    return None


NO_ANSWER: Final = "no answer"
"""Returned by *once* if the server could not be asked: it may be starting up again."""


def polls(seconds: float) -> Iterator[None]:
    """Yield at once, and again every few milliseconds until *seconds* are over. Switches: yes, in between."""
    end = _clock.monotonic() + seconds
    pause = 0.002
    yield
    while (left := end - _clock.monotonic()) > 0:
        process.sleep(min(left, pause * (0.5 + random())))
        pause = min(2 * pause, _LONGEST_POLL)
        yield


def transaction_status(raw: object) -> int | None:
    """Return the transaction's status as the PostgreSQL driver knows it: `IDLE` and so on. None: it does not know."""
    client = getattr(raw, "pgconn", None)  # psycopg 3 makes an object, and a member of an enum, for `info`
    found = getattr(getattr(raw, "info", None) if client is None else client, "transaction_status", None)
    if found is None:
        return _OF_PG8000.get(getattr(raw, "_transaction_status", None))
    return int(found)


def was_not_committed(raw: object) -> bool:
    """Return whether libpq knows that COMMIT was not sent, or was skipped.

    It knows if the transaction is still open, or has failed: for a lost connection it says `UNKNOWN`, and while it
    waits for an answer, `ACTIVE`. pg8000 is not so careful.
    """
    return hasattr(raw, "info") and transaction_status(raw) in {IN_TRANSACTION, FAILED}


IDLE: Final = 0
ACTIVE: Final = 1
IN_TRANSACTION: Final = 2
FAILED: Final = 3
UNKNOWN: Final = 4
"""libpq's PQTRANS_…, as psycopg and psycopg2 return them."""

_OF_PG8000: Final[dict[object, int]] = {b"I": IDLE, b"T": IN_TRANSACTION, b"E": FAILED}
