"""Children of `os.fork` under gevent, waited for: gevent's own `os.waitpid` may never hear of one that ends at once."""

from __future__ import annotations

import os
from typing import Any, Final

import gevent
from gevent import monkey

_waitpid: Final[Any] = monkey.get_original("os", "waitpid")


def wait_for(pid: int) -> int:
    """Give the status of the child *pid* when it has ended. Others run meanwhile."""
    while True:
        try:
            found, status = _waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # gevent's loop has heard of it
            return os.waitpid(pid, 0)[1]
        if found:
            return int(status)
        gevent.sleep(0.005)
