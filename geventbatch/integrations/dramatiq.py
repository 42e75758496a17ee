"""Dramatiq workers on gevent (``dramatiq-gevent``): a middleware of the broker.

    from geventbatch.integrations.dramatiq import Stop

    broker.add_middleware(Stop())

When a worker is told to end (TERM, INT or HUP), Dramatiq lets its messages finish first. Before the process ends, every
admitted operation is then saved, even if no message waits for it. When it starts, the garbage collector leaves out
what it has loaded (``GEVENTBATCH_FREEZE=0`` in the environment refuses).

With ``dramatiq`` in place of ``dramatiq-gevent``, each message has a thread: there is nothing to batch, so set
``batching=False``. (Operations of `GeventBatch` and over a `DjangoStore` run unbatched there by themselves.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import dramatiq

from geventbatch import stop_all
from geventbatch.integrations._collector import freeze_loaded

if TYPE_CHECKING:
    from dramatiq import Broker, Worker

__all__ = ["Stop"]


class Stop(dramatiq.Middleware):
    """A middleware that stops all processors when a worker process ends."""

    def after_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Leave out of garbage collections what the worker process has loaded. Switches: no."""
        del broker, worker
        freeze_loaded()

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        """Stop all processors. Dramatiq calls it in each worker process, when its messages have ended.

        Every batch ends by its ``max_duration``, so the wait has no other limit. Dramatiq logs any error.

        Switches: yes, until every admitted operation is answered.
        """
        del broker, worker
        stop_all()
