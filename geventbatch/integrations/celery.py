"""Celery workers on gevent (``celery worker --pool gevent``): one line in the module of the Celery application.

    import geventbatch.integrations.celery

When a worker is told to end (TERM, or one INT), Celery lets its tasks finish first. Then, before the process ends, all
that was admitted is saved, what no task waits for included. Nothing waits at a cold shutdown (QUIT, or a second INT):
what had not been saved then was not answered either.

The tasks have to be run by gevent or alone (``--pool solo``). In a pool of processes each task is alone in its own:
there is nothing to batch, and ``batching=False`` is right. In a pool of threads it is the only thing that works.
"""

from __future__ import annotations

from celery.signals import worker_process_shutdown, worker_shutdown

from geventbatch import stop_all

__all__ = ["stop"]


def stop(**_: object) -> None:
    """Stop all processors: connected to Celery's signals at the end of a worker and of each process of a pool.

    Every batch ends by its ``max_duration``, so there is no other limit to the wait. Celery logs what it raises.

    Switches: yes, until all that was admitted is answered.
    """
    stop_all()


worker_shutdown.connect(stop)
worker_process_shutdown.connect(stop)
