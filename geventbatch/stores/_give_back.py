"""Returns a batch's connection to its pool: an error of that is logged, and changes no outcome. Imports no vendor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from geventbatch._alarm_timeout import MaxDuration
from geventbatch._batch import batch_at_hand
from geventbatch._core.verdict import kill_behind
from geventbatch._watch import log

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Sequence

    from geventbatch._core.attempt import Attempt


def give_back(
    key: Hashable, call: Callable[..., object], *args: object, saved: bool | None, lost: Collection[Hashable] = ()
) -> None:
    """Call *call*, after the batch of *key* was *saved*, or given up, or while it goes on (None); log what that raises.

    Such an error mostly comes from a listener of the application's. If it was saved, all but the keys that are *lost*,
    then that is the outcome, even if the deadline or a kill interrupts *call*. Raises as `error_of`. Switches: as
    *call* does.
    """
    committed = [one for one in _to_save(lost) if not one.committed] if saved else ()
    for one in committed:
        one.committed = True
    try:
        error = error_of(call, *args)
    except BaseException as ending:
        if saved:
            _tell(key, ending, saved=True)
        raise
    for one in committed:
        one.committed = False
    if error is not None:
        _tell(key, error, saved=saved)


def _to_save(lost: Collection[Hashable]) -> Sequence[Attempt]:
    """Return the attempts whose save this store's COMMIT has ended: none inside a function or a scope of the user's."""
    attempt = batch_at_hand().attempt
    if attempt is None or attempt.phase != "save" or not _is_ours(attempt.scope):
        return ()
    if attempt.mates is None:
        return () if lost else (attempt,)
    return [one for one in attempt.mates if one.phase == "save" and not any(key in lost for key in one.batch.loads)]


def _is_ours(scope: Any) -> bool:
    while type(scope).__module__ in _AROUND:
        scope = getattr(scope, "of_many", None) or getattr(scope, "_inner", None)
    return type(scope).__module__.startswith("geventbatch.stores.")


_AROUND: Final = ("geventbatch._bulk.scopes", "geventbatch.integrations.flask._scope")
"""The modules of our own scopes that wrap another one, and add nothing to its save."""


def _tell(key: Hashable, error: BaseException, *, saved: bool | None) -> None:
    if isinstance(error, MaxDuration):
        log.error(f"{_WHEN[saved]}, {_TOO_LONG}", key, error=error)
    else:
        log.error(f"{_WHEN[saved]}, its connection or a listener raised: %s", key, error, error=error)


_TOO_LONG: Final = (
    "its max_duration passed while its connection was given back, which waited where the traceback ends. Its answers "
    "are not changed by this; the connection is closed"
)


def error_of(call: Callable[..., object], *args: object) -> Exception | None:
    """Call *call*, which cleans up after a batch, and return the error that it raises; None if it raises none.

    Raises only what is meant for the greenlet: a kill or a `Timeout`, even one that another error has replaced. (A
    `SystemExit` that another error has replaced was handled by the code that raised it.)
    Switches: as *call* does.
    """
    handled = sys.exc_info()[1]
    try:
        call(*args)
    except BaseException as raised:
        attempt = batch_at_hand().attempt
        ending = raised if attempt is None else kill_behind(attempt, raised, handled)
        if not (isinstance(raised, Exception) and isinstance(ending, (Exception, SystemExit))):
            raise ending from ending.__cause__
        return raised
    return None


_WHEN: Final = {
    True: "after the batch of key %s was saved",
    False: "after the batch of key %s was given up",
    None: "while the batch of key %s went on",
}
