"""A call that is not waited for if it waits: of a watcher, say, that does I/O at the start of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import gevent
from greenlet import greenlet

from geventbatch._core import process

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

_ENDED: Final = object()


def call_aside(context: Context, failed: Callable[[Exception], object], function: Any, *args: Any) -> Context | None:
    """Call *function* in a copy of *context*, and return the copy; None if it waits, or is killed.

    If *function* waits, it goes on by itself. If it raises, now or later, *failed* is called with the error. Switches:
    only if *function* does.
    """
    inside = context.copy()

    def call() -> object:
        try:
            inside.run(function, *args)
        except Exception as error:
            failed(error)
        except BaseException:  # a kill of this greenlet ends nothing else
            return None
        return _ENDED

    if not process.has_hub():
        return inside if call() is _ENDED else None
    hub: Any = gevent.get_hub()
    callee = greenlet(call)  # a child of ours: if it ends without having waited, it comes back here
    resume = hub.loop.run_callback(gevent.getcurrent().switch)
    try:
        return inside if callee.switch() is _ENDED else None
    finally:
        resume.stop()
        if not callee.dead:
            callee.parent = hub
