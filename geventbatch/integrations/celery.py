"""Celery workers on gevent (``celery worker --pool gevent``): one line in the module of the Celery application.

    import geventbatch.integrations.celery

When a worker is told to end (TERM, or one INT), Celery lets its tasks finish first. Before the process ends, every
admitted operation is then saved, even if no task waits for it. A cold shutdown (QUIT, or a second INT) does not wait:
an operation that was not saved by then was not answered either.

When a worker is ready, the garbage collector leaves out what it has loaded, and begins a pass after 10,000 objects:
with thousands of callers it would keep the hub for a tenth of a second otherwise. ``GEVENTBATCH_FREEZE=0`` in the
environment refuses.

The tasks must be run by gevent, or one at a time (``--pool solo``). In a pool of processes, each task is alone in its
process, and in a pool of threads in its thread: there is nothing to batch, so set ``batching=False``. (In threads,
operations of `GeventBatch` and over a `DjangoStore` run unbatched by themselves.)
"""

from __future__ import annotations

from celery.signals import worker_process_shutdown, worker_ready, worker_shutdown

from geventbatch import stop_all
from geventbatch.integrations._collector import freeze_loaded

__all__ = ["stop"]


def _freeze(**_: object) -> None:
    freeze_loaded()  # again after each reconnection to the broker, but the first time only something is done


def stop(**_: object) -> None:
    """Stop all processors. Connected to Celery's signals at the end of a worker and of each process of a pool.

    Every batch ends by its ``max_duration``, so the wait has no other limit. Celery logs any error.

    Switches: yes, until every admitted operation is answered.
    """
    stop_all()


worker_ready.connect(_freeze)
worker_shutdown.connect(stop)
worker_process_shutdown.connect(stop)
