"""Threads that gevent has not patched: operations run unbatched there, and the process is warned once."""

from __future__ import annotations

import sys
import threading
from itertools import count
from typing import Final

from gevent import monkey

from geventbatch._watch.problem import SetupProblem, warn

_PROBLEM: Final = SetupProblem(
    "unpatched",
    "gevent has not patched this process, which calls run(): each operation loads and saves by itself, in the thread "
    "of its caller, and nothing is batched. That is right for a development server, and gains nothing.",
    "Serve with gunicorn's gevent worker (see geventbatch.integrations.gunicorn), or run tasks in greenlets "
    "(geventbatch.integrations has a module for each of Celery, Dramatiq and Huey). If threads are meant, pass "
    "batching=False, and this is not said.",
)
_UNCOMPARED: Final = SetupProblem(
    "uncompared",
    "Threads run operations unbatched over a pair of functions, which compares nothing: what one of them saves, and "
    "answers, is written over by another that has loaded before.",
    "Use a store (SQLAlchemyStore, DjangoStore, RedisStore, SQLStore), which locks or compares; "
    "or serve with gevent's workers.",
)
_ANSWER_THERE: Final = frozenset({"gunicorn.workers.sync", "uwsgi"})
"""Modules that are imported only where the main thread answers requests."""

_threads: Final = count()
_pairs: Final = count()


def run_unbatched(*, comparing: bool = True) -> bool:
    """Return whether an operation called here runs unbatched, since gevent has not patched the process.

    The first time in a thread that is not the main one, as servers and task queues have them, it warns; also in the
    main one of a server that answers there. Management commands, cron jobs and tests hear nothing.

    Args:
        comparing: Whether the store locks, or compares what was loaded.
    """
    if monkey.is_module_patched("threading"):
        return False
    if threading.current_thread() is not threading.main_thread() or not _ANSWER_THERE.isdisjoint(sys.modules):
        first = next(_threads) == 0  # one step: no other thread is first too
        if not comparing and next(_pairs) == 0:
            warn(_UNCOMPARED)
        if first:
            warn(_PROBLEM)
    return True
