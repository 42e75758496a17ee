"""Log lines for operators. As long as all is well, there are none, and they cost nothing.

A log handler may wait, raise or be slow, but code that meets a problem must not switch. So lines are logged `Later`.
"""

from __future__ import annotations

import logging
import traceback
from types import CodeType
from typing import TYPE_CHECKING, Any, Final

from geventbatch._core import process
from geventbatch._core.clock import clock
from geventbatch._core.operation import attribute, name_of, unwrapped
from geventbatch._safe_repr import said, shown
from geventbatch._watch.call_later import MOST, Later
from geventbatch.errors import Rejected, ResourceMissing, named

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.batch import Batch
    from geventbatch._core.operation import Operation
    from geventbatch._core.undo import Undo
    from geventbatch._failure import Failure
    from geventbatch._options import Options

_log: Final = logging.getLogger("geventbatch")
_log.addHandler(logging.NullHandler())  # quiet, unless the application configures logging

_SOON: Final = 0.1
"""Seconds. Code that was interrupted at its deadline has returned after so long, as a rule."""


class _Reporter(Later):
    """Logs one line after the other."""

    def tell(self, level: int, line: Callable[[], object]) -> None:
        """Call *line*, which logs at *level*, soon. Switches: no, in the thread that has batches."""
        if _log.isEnabledFor(level):
            self.add(line)


_reporter: Final = _Reporter("%d more lines were dropped, since %d waited to be logged")


# -- lines that would repeat ------------------------------------------------------------------------------------

AGAIN: Final = 60.0
"""Seconds for which a line is not repeated."""

_logged_at: dict[int, float] = {}
"""By hash of the subject: monotonic seconds when it was last logged."""

process.after_fork(_logged_at.clear)


def is_due(*what: object) -> bool:
    """Return True, once a minute for each subject *what*. Switches: no."""
    like, now = hash(what), clock.monotonic()
    if 0 <= now - _logged_at.get(like, -AGAIN) < AGAIN:
        return False
    if len(_logged_at) >= MOST:
        _logged_at.clear()
    _logged_at[like] = now
    return True


def shows_again(cause: BaseException) -> tuple[object, ...]:
    """Return class, notes and places of *cause*, without its message: a database that is down fails batches alike."""
    places = tuple((frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(cause.__traceback__))
    kinds = type(cause).__qualname__, type(cause.__cause__).__qualname__
    return *kinds, shown(getattr(cause, "__notes__", None)), places


def has_place(cause: BaseException) -> bool:
    """Return whether *cause* says where it was raised, or where the code of a batch waited."""
    return cause.__traceback__ is not None or hasattr(cause, "__notes__")


SHOWN_BEFORE: Final = "; its traceback was logged with the same failure, less than a minute ago"


def failed(name: str, failure: Failure, callers: int) -> None:
    """Log that a batch of the processor *name* failed, but for a missing resource, which concerns its callers only."""
    if failure.kind is ResourceMissing:
        return

    def line() -> None:
        cause = failure.cause
        tells = has_place(cause)
        again = tells and not is_due(name, failure.phase, *shows_again(cause))
        under = (type(cause), cause, cause.__traceback__) if tells and not again else None
        _log.error(
            "%s: %s; callers answered with it: %d%s",
            name,
            failure.exception(),
            callers,
            SHOWN_BEFORE if again else "",
            exc_info=under,
        )

    _reporter.tell(logging.ERROR, line)


def overloaded(options: Options, refused: int) -> None:
    """Log once a minute that operations are refused at the door. *refused* is their number so far."""
    if is_due(options.name, "overloaded"):
        _reporter.tell(
            logging.WARNING,
            lambda: _log.warning(
                "%s: refuses operations, since max_pending of %d wait already (ProcessorOverloaded, number %d of this "
                "process): load and save have become slower, or more come than they can take; told again in %g s, if "
                "it goes on",
                options.name,
                options.max_pending,
                refused,
                AGAIN,
            ),
        )


def refused(batch: Batch, refusal: Rejected, error: BaseException) -> None:
    """Note on *error*, the caller's, that the store refused an operation of *batch*, and log it once a minute.

    Do nothing if data may have broken it, as they break a constraint.
    """
    if not refusal.of_schema:
        return
    cause = "A column, a table or a right may be missing (a migration? the store's create_table()?)"
    error.add_note(f"The store refused an operation on key {shown(batch.key)}: nothing of it was saved. {cause}.")
    if is_due(batch.dispatcher.options.name, "refused", type(error).__qualname__, said(error).partition("\n")[0]):
        message = (
            "the store refused an operation, which no constraint did: %s. Its caller has this error, and nothing of it "
            "was saved. %s; told again in %g s, if it goes on"
        )
        _warn(batch, message, shown(error), cause, AGAIN)


def slow(batch: Batch, doing: str, seconds: float) -> None:
    """Log that the load or save of *batch*, or of its whole bulk, took more than half of ``max_duration``."""
    most = batch.dispatcher.options.max_duration
    message = "its %s took %.3f s of the max_duration of %g s"
    _warn(batch, message, doing, seconds, most, keys=tuple(batch.bulk) or None)


def killed(batches: list[Batch], error: BaseException) -> None:
    """Log that *error* has killed the worker of *batches*."""
    keys = {id(key): key for batch in batches for key in batch.loads}
    message = "its worker was killed by %s; another takes its place"
    _warn(batches[0], message, shown(error), keys=tuple(keys.values()))


def lost(attempt: Attempt) -> None:
    """Log that a worker ends, since *attempt* has left it unfit."""
    batch, late = attempt.batch, clock.monotonic() - attempt.deadline
    if late > _SOON:
        message = (
            "its code has returned %.3f s after its deadline, and its worker is not used again; another takes its place"
        )
        _warn(batch, message, late)
    elif late <= 0:  # else its code has returned in time, and the failure of the batch is logged
        _warn(batch, "its worker is not used again; another takes its place")


def returned_own(batch: Batch, operation: Operation[Any], kind: type) -> None:
    """Log that *operation* returned an instance of *kind* that belongs to its batch."""
    _warn(
        batch,
        "%s returned its %s, which is the batch's own: later operations go on changing it, and its caller may read "
        "changes that were never saved, or use a session that is closed. Return values of it; this is told once",
        name_of(operation.callable),
        kind.__qualname__,
    )


def undoing(attempt: Attempt, undo: Undo, operation: str, kind: type[BaseException]) -> None:
    """Log that undoing took a good part of the time, most of it for *operation*, which raised a *kind*.

    Each operation and class is logged once.
    """
    if _is_new("undoing", attempt.dispatcher.options.name, operation, kind):
        message = (
            "undoing %d operations that raised took %.0f ms of its %.0f ms, most of it for %s, which raised %s. If the "
            "operation changes nothing before it raises that, say clean_errors=(%s,): then there is nothing to undo. "
            "Told once of each operation and error"
        )
        total, name = clock.monotonic() - attempt.started, kind.__qualname__
        _warn(attempt.batch, message, undo.count, undo.seconds * 1000, total * 1000, operation, name, name)


def cannot_undo(attempt: Attempt, why: BaseException, function: Any, kind: type[BaseException]) -> None:
    """Log that the changes of *function*, which raised a *kind*, cannot be undone; *why* is the reason.

    Each operation and class is logged once.
    """
    batch = attempt.batch
    if _is_new("cannot undo", batch.dispatcher.options.name, name_of(function), kind):
        advice = (
            "Let it raise before it writes to the database or changes what cannot be copied"
            if hasattr(attempt.scope, "restore")
            else "Pass a copy_resource that can copy the resource, or give its scope checkpoint() and restore()"
        )
        message = (
            "what %s had changed by the time that it raised %s cannot be undone in memory (%s): each such error "
            "costs its batch another load. %s. If the operation changes nothing before it raises that, say "
            "clean_errors=(%s,). Told once of each operation and error"
        )
        name = kind.__qualname__
        _warn(batch, message, name_of(function), name, shown(why), advice, name)


def same_again(batch: Batch, function: Any, kind: type[BaseException]) -> None:
    """Log, once, that a load returned again the object of a batch in which *function* raised a *kind*."""
    if _is_new("same again", batch.dispatcher.options.name):
        message = (
            "%s raised %s, and the next load returned the same object: what had changed in it by then stays. "
            "Let the load return a new object each time, made of the saved state, or name errors that are raised "
            "before anything is changed in clean_errors. Told once"
        )
        _warn(batch, message, name_of(function), kind.__qualname__)


def error(message: str, *values: object, error: BaseException) -> None:
    """Log *error*, which reaches no caller. The line *message* says where; it has a ``%s`` for each of *values*."""
    _reporter.tell(logging.ERROR, lambda: _log.error(message, *map(shown, values), exc_info=error))


def saved_apart(store: str, what: str, why: str) -> None:
    """Log once that *store* saves *what* in bulk in transactions of their own, since saving it runs foreign code."""
    if _is_new(saved_apart, store, what, why):
        _reporter.tell(
            logging.WARNING,
            lambda: _log.warning(
                "%s saves each key of %s in a transaction of its own, or the keys that operations connect, also in "
                "bulk: it has %s, which may write rows of other keys. Each costs a load and a COMMIT",
                store,
                what,
                why,
            ),
        )


def watcher_waits(watcher: object) -> None:
    """Log once a minute that *watcher* waits at the start of a batch, which goes on without it."""
    if is_due("waits", id(watcher)):
        _reporter.tell(
            logging.WARNING,
            lambda: _log.warning(
                "%s waits where a batch begins (a span processor's on_start, say), which is not waited for: the load "
                "and the save are not inside of its span; told again in %g s, if it goes on",
                shown(watcher),
                AGAIN,
            ),
        )


def watcher_failed(watcher: object, raised: Exception) -> None:
    """Log the error that *watcher* *raised* as a batch began or ended, or as it was closed."""
    error("%s raised as a watcher; no batch is affected", watcher, error=raised)


def _warn(batch: Batch, message: str, *values: object, keys: tuple[Hashable, ...] | None = None) -> None:
    name, its = batch.dispatcher.options.name, batch.keys if keys is None else keys
    _reporter.tell(
        logging.WARNING,
        lambda: _log.warning(f"%s: batch of %s: {message}", name, named(its), *values),
    )


# -- code that blocks the hub -----------------------------------------------------------------------------------

_MOST_PLACES: Final = 1000
"""If there are more, the same places may be logged again: a program may make code at run time without end."""

_logged: set[object] = set()
"""The places, and other subjects, that were logged."""


def blocked(batch: Batch, doing: str, function: Any, seconds: float, used: float) -> None:
    """Log, once for each place, that *function* kept the hub for so many *seconds* without a yield.

    *used* is its CPU time in seconds.
    """
    name, place = name_of(function), place_of(function)
    if not _is_new(name, place):
        return
    message = (
        "%s, %s (%s), kept the hub for %.3f s without a yield: no other greenlet of this process could run. It had "
        "%.3f s of CPU time. If that is most of it, do the computing elsewhere. Otherwise it waited for what gevent "
        "has not patched (geventbatch.check_setup() names drivers that block, but for sqlite3, which always does), or "
        "the process was stopped meanwhile, or other work had the machine's CPUs. This place is not named again"
    )
    _warn(batch, message, doing, name, place, seconds, min(used, seconds))


def _is_new(*what: object) -> bool:
    """Return whether the subject *what* was not logged before; from now on it counts as logged."""
    if what in _logged:
        return False
    if len(_logged) >= _MOST_PLACES:
        _logged.clear()
    _logged.add(what)
    return True


def place_of(function: Any) -> str:
    """Return file and line of *function*, or of its class; the name of its module if they are unknown."""
    function = unwrapped(function)
    code = attribute(attribute(function, "__func__") or function, "__code__")
    if isinstance(code, CodeType):
        return f"{code.co_filename}:{code.co_firstlineno}"
    return str(attribute(function, "__module__") or type(function).__module__)
