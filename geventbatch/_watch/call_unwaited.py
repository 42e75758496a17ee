"""A call that nobody waits for if it waits: a watcher's, say, that does I/O where a batch begins."""

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
    """Call *function* in a copy of *context*, and give that. When it waits, go on without it: None. Switches: if so.

    What it raises is given to *failed*, whenever that is.
    """
    inside = context.copy()

    def call() -> object:
        try:
            inside.run(function, *args)
        except Exception as error:
            failed(error)
        except BaseException:  # a kill of its own is nobody else's
            return None
        return _ENDED

    if not process.has_hub():
        return inside if call() is _ENDED else None
    hub: Any = gevent.get_hub()
    callee = greenlet(call)  # whose parent we are, so that it comes back here when it ends without having waited
    resume = hub.loop.run_callback(gevent.getcurrent().switch)
    try:
        return inside if callee.switch() is _ENDED else None
    finally:
        resume.stop()
        if not callee.dead:
            callee.parent = hub
