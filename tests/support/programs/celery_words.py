"""A Celery application that acknowledges late, and adds words; run as a program, it sends tasks."""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery

import geventbatch.integrations.celery  # noqa: F401 - the line that users write
from tests.support.programs import words

app = Celery("tests.support.programs.celery_words", broker=words.REDIS_URL)
app.conf.update(
    task_acks_late=True,
    task_default_queue=words.QUEUE,
    broker_transport_options={
        "global_keyprefix": words.QUEUE,
        "polling_interval": 3,  # under gevent, it looks for unacknowledged tasks only if Redis lets it wait for 2 s
        "unacked_restore_throttle": 1,  # and does so each time
        "unacked_mutex_expire": 1,  # seconds: by default, a worker killed while it looks keeps others from it for 300
        "visibility_timeout": int(
            os.environ["VISIBILITY_TIMEOUT"]
        ),  # seconds, until a killed worker's tasks are redelivered
    },
)


def _count(self: Any, word: str) -> None:
    words.count(word, self.request.id)


add = app.task(name="add", acks_late=False)(words.add)
add_later = app.task(name="add_later", acks_late=False)(words.add_later)
count = app.task(bind=True, name="count")(_count)
count_briefly = app.task(bind=True, name="count_briefly", time_limit=1.5)(_count)

if __name__ == "__main__":
    for name, number in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        for index in range(int(number)):
            app.tasks[name].delay(f"{name}{index}")
else:
    words.open_ledger()
