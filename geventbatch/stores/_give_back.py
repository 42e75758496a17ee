"""Returns a batch's connection to its pool: an error of that is logged, and changes no outcome. Imports no vendor."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from geventbatch._batch import batch_at_hand
from geventbatch._core.verdict import kill_behind
from geventbatch._watch import log

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


def give_back(key: Hashable, call: Callable[..., object], *args: object, saved: bool | None) -> None:
    """Call *call*, after the batch of *key* was *saved*, or given up, or while it goes on (None); log what that raises.

    Such an error mostly comes from a listener of the application's. Raises as `error_of`. Switches: as *call* does.
    """
    try:
        error = error_of(call, *args)
    except BaseException as ending:
        if saved:  # its callers are told that the outcome is unknown
            _tell(key, ending, saved=True)
        raise
    if error is not None:
        _tell(key, error, saved=saved)


def _tell(key: Hashable, error: BaseException, *, saved: bool | None) -> None:
    log.error(f"{_WHEN[saved]}, its connection or a listener raised: %s", key, error, error=error)


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
