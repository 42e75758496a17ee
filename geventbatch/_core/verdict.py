"""Decides how an attempt goes on after an operation that raised, or that its scope has to look at (guarantee 18)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import gevent
from gevent import GreenletExit

from geventbatch._core.halving import cut_after, cut_before
from geventbatch._core.operation import BROKEN, name_of
from geventbatch._failure import rejected
from geventbatch._safe_repr import said, shown
from geventbatch._values.answers import Copying, TooDeep, Unfinished
from geventbatch.errors import Apart, NotSaved, Rejected, TooEarly, Undecided, named

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.batch import Batch
    from geventbatch._core.operation import Operation
    from geventbatch._core.steps import Steps

E = TypeVar("E", bound=BaseException)

KILLS: Final = (GreenletExit, SystemExit, KeyboardInterrupt)

traceback_of: Final[Any] = BaseException.__dict__["__traceback__"].__get__  # past any property of a user's class

_OURS: Final = frozenset({TooDeep, Unfinished})
"""Errors that we raise for an operation: it has returned a value that is no answer."""

_OF_A_TUPLE: Final = ("'tuple' object ", "tuple indices must be ")
"""How Python's errors begin if a tuple is used as what it is not."""

_LOADS: Final = 4
"""Operations that spoil the transaction and may cost a load each. After them, attempts go step by step, if they can."""


GOES_ON: Final = 0
ENDS: Final = 1
TO_UNDO: Final = 2


def judge(attempt: Attempt, operation: Operation[Any], error: BaseException) -> int:
    """Keep *error* of *operation* for its caller. Return `GOES_ON`, `ENDS`, or `TO_UNDO`: undo it first."""
    if attempt.over() or not is_a(error, (Exception, gevent.Timeout)):
        operation.error = error
        raise error
    operation.error = without_our_frame(error)
    idempotency = attempt.dispatcher.options.idempotency
    if idempotency is not None and idempotency.is_recalled(operation, error):
        return GOES_ON
    if type(error) is TypeError or type(error) is AttributeError:
        _say_how_called(attempt, operation, error)
    attempt.forget_operation()
    verdict = _ask(attempt, "operation_raised", error)
    steps = _steps_for(attempt, verdict)
    if steps is not None and (verdict is None or isinstance(verdict, Rejected)):
        return GOES_ON if steps.undo(attempt, operation) else ENDS
    if verdict is not None:
        _obey(attempt, operation, verdict, error)
        return ENDS
    if idempotency is not None and not idempotency.is_recorded(attempt, operation):
        attempt.asked = [*(attempt.asked or ()), operation]  # in no save: the store must be asked for its key
    return GOES_ON if is_clean(attempt.batch, error) else TO_UNDO


def _say_how_called(attempt: Attempt, operation: Operation[Any], error: BaseException) -> None:
    """Put operation, keys and arguments into *error*, if Python raised it because *operation* does not take these.

    Or because it was written for one resource, and `run_across` has given it a tuple of them.
    """
    keys, told = attempt.batch.keys, said(error)
    several = len(keys) > 1
    if not (several and told.startswith(_OF_A_TUPLE)) and not (type(error) is TypeError and _is_of_the_call(error)):
        return
    number = len(operation.args)
    given = f"and {number} {'argument' if number == 1 else 'arguments'}" if number else "alone"
    what = "a tuple of the resources" if several else "the resource"
    message = f"the operation {name_of(operation.callable)} on {named(keys)} was called with {what} {given}: {told}"
    error.args = (f"{message}; nothing of it was saved",)


def _is_of_the_call(error: BaseException) -> bool:
    """Return whether *error* was raised before any code of the operation ran."""
    trace: Any = traceback_of(error)
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if not name.startswith(("geventbatch._", "geventbatch.testing.")):
            return False
        trace = trace.tb_next
    return True


def look(attempt: Attempt, operation: Operation[Any]) -> bool:
    """See to what *operation* has asked for: see `Attempt.must_look`. Return True if the attempt ends here."""
    if attempt.over():
        return True
    steps = attempt.steps
    if attempt.rows_added:
        _keep_rows(attempt)
        attempt.must_look = bool(attempt.deleted) or attempt.cut_off or attempt.doubted or steps is not None
    if attempt.doubted:
        attempt.doubted = False
        attempt.must_look = bool(attempt.deleted) or attempt.cut_off or steps is not None
        verdict = _ask(attempt, "operation_returned")
        if verdict is not None:
            judging = _steps_for(attempt, verdict)
            if isinstance(verdict, Rejected) and judging is not None:
                return not judging.refuse(attempt, operation, verdict)
            operation.error = error = rejected(verdict)
            _obey(attempt, operation, verdict, error)
            return True
    if attempt.deleted or attempt.cut_off:
        cut_after(attempt, operation)
        return True
    if attempt.undo is not None and attempt.undo.ahead:
        attempt.undo.copy_ahead(attempt, operation)
    return steps is not None and operation.error is None and not steps.keep(attempt, operation)


def _keep_rows(attempt: Attempt) -> None:
    """Copy the rows that the operation at hand has added: a dict in them may be a part of the resource too."""
    rows, mark = attempt.rows_added or [], attempt.completed - 1
    place = len(rows) - 1
    while place >= 0 and rows[place][0] == mark:
        with suppress(RecursionError):  # a row nested so deep is inserted as it is at the save
            rows[place] = mark, Copying().copy(rows[place][1])
        place -= 1


def _obey(attempt: Attempt, operation: Operation[Any], verdict: NotSaved, error: BaseException) -> None:
    """End the attempt by *verdict*, the scope's on *error* of *operation*."""
    attempt.verdict = verdict
    if not isinstance(verdict, Rejected):
        return
    # A cached resource may be outdated: the operation is judged by what the next attempt loads.
    if (isinstance(verdict, Undecided) and _goes_on_differently(attempt, operation, verdict)) or is_reused(attempt):
        attempt.broken = error
    else:  # the transaction is spoiled: no other operation can be tried in it
        put_out(attempt, operation, error)
        attempt.rejections += 1
        attempt.stepwise = attempt.stepwise or attempt.rejections > _LOADS


def _steps_for(attempt: Attempt, verdict: NotSaved | None) -> Steps | None:
    """Return the steps that see to *verdict*, if any. Before the first refusal, steps do not show the culprit."""
    if isinstance(verdict, TooEarly) or (isinstance(verdict, Undecided) and not attempt.rejections):
        return None
    return attempt.steps


def _goes_on_differently(attempt: Attempt, operation: Operation[Any], verdict: Undecided) -> bool:
    """Plan another attempt in which *operation* stays: step by step, after those before it were saved, or apart.

    Return False if none is possible.
    """
    if isinstance(verdict, Apart):
        attempt.apart = True
        return True
    if isinstance(verdict, TooEarly):
        return cut_before(attempt, operation) or _goes_apart(attempt)
    if attempt.steps is not None or can_begin_steps(attempt):
        attempt.rejections += 1  # so that each step is written, which shows the culprit
        attempt.stepwise = True
        return True
    return not is_reused(attempt) and (cut_before(attempt, operation) or _goes_apart(attempt))


def _goes_apart(attempt: Attempt) -> bool:
    """Plan an attempt without the other keys of its bulk: operations on those were earlier ones too.

    Return False if it had none.
    """
    if attempt.mates is None or attempt.apart or attempt.loaded_with <= len(attempt.batch.loads):
        return False
    attempt.apart = True
    return True


def put_out(attempt: Attempt, operation: Operation[Any], error: BaseException) -> None:
    """Replay the batch without *operation*. It comes back if all are replayed after a conflict."""
    operation.state = BROKEN
    idempotency = attempt.dispatcher.options.idempotency
    if (
        idempotency is not None
        and idempotency.once_of(operation) is not None
        and operation not in (attempt.asked or ())
    ):
        attempt.asked = [*(attempt.asked or ()), operation]
    if attempt.broken is None:
        attempt.broken = error


# -- questions to the scope -----------------------------------------------------------------------------------


def _ask(attempt: Attempt, what: str, *about: object) -> NotSaved | None:
    """Ask the scope after an operation whether its transaction can still be saved. *what* names its method."""
    question: Any = getattr(attempt.scope, what, None)
    verdict: object = None if question is None else attempt.context.run(question, *about)
    if verdict is not None and not isinstance(verdict, NotSaved):
        raise TypeError(f"{what} returned {shown(verdict)}, but must return None, or an instance of NotSaved")
    return verdict


def can_begin_steps(attempt: Attempt) -> bool:
    """Return whether the attempt could go step by step, and does not yet. A scope of many keys cannot."""
    if attempt.steps is not None or attempt.mates is not None or is_reused(attempt):
        return False
    return bool(getattr(attempt.scope, "steps", False))


def is_reused(attempt: Attempt) -> bool:
    """Return whether the scope reused a cached resource.

    Then it must compare versions before any caller is answered. So it is exited as for a save even if there is nothing
    to save.
    """
    return bool(getattr(attempt.scope, "reused", False))


# -- errors -----------------------------------------------------------------------------------------------------


def is_clean(batch: Batch, error: BaseException) -> bool:
    """Return whether *error* promises that there is nothing to undo."""
    clean = batch.dispatcher.options.clean_errors
    if not clean or type(error) in _OURS:
        return False
    idempotency = batch.dispatcher.options.idempotency
    return is_a(error, clean) and not (idempotency is not None and type(error) is idempotency.NotPlain)


def ends_greenlet(attempt: Attempt, error: BaseException) -> bool:
    """Return whether *error* is for the greenlet that runs the batch, not for the batch."""
    # An unbatched operation runs in its caller's own greenlet. A Timeout out of its load or save, other than its
    # alarm's, is the caller's own.
    if is_a(error, KILLS):
        return True
    return attempt.alone and is_a(error, gevent.Timeout) and not (attempt.alarm and error is attempt.alarm.timeout)


def kill_behind(attempt: Attempt, error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the error that has ended the greenlet, if *error* has only replaced it; else *error*.

    Clean-up code may raise while a kill passes through it: Django's ``atomic`` does. *handled* is an error that was
    being handled before the batch began, and does not concern the batch.
    """
    links, seen = [error], 0
    while links and seen < _LINKS:
        link = links.pop()
        seen += 1
        if link is handled or (link is not error and _was_handled(link)):
            continue
        if ends_greenlet(attempt, link):
            return link
        links += [one for one in (link.__context__, link.__cause__) if one is not None]
    return error


def _was_handled(error: BaseException) -> bool:
    """Return whether *error* is a Timeout that the code which started it has closed."""
    return is_a(error, gevent.Timeout) and getattr(error, "timer", None) is _CLOSED


_CLOSED: Final = gevent.Timeout(None).timer
"""The timer of every closed Timeout."""

_LINKS: Final = 50
"""Errors that are looked at, along `__context__` and `__cause__`."""


def is_a(error: BaseException, kinds: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    """Return whether ``except`` would catch *error* as one of *kinds*, without reading its ``__class__``."""
    try:
        return issubclass(type(error), kinds)
    except Exception:
        return False


def without_our_frame(error: E) -> E:
    """Begin the traceback of *error* in the user's function.

    Our frame refers to the operations of other callers too. It would keep them alive, and a log that shows the
    variables of frames would show them.
    """
    trace: Any = traceback_of(error)
    BaseException.with_traceback(error, trace and trace.tb_next)
    return error
