"""The exception of an alarm. It is not compiled, since mypyc cannot extend gevent's `Timeout`."""

from __future__ import annotations

import gevent


class MaxDuration(gevent.Timeout):
    """Thrown at the deadline. Users read its name in the traceback of interrupted code."""
