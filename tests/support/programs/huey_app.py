"""A Huey application, which adds words: a consumer, or a program that enqueues tasks."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import logging
import sys
from typing import Any

from huey import RedisHuey

from geventbatch.integrations.huey import consume
from tests.support.programs import words

huey: Any = RedisHuey(words.QUEUE, url=words.REDIS_URL, read_timeout=0.2)

add = huey.task()(words.add)
add_later = huey.task()(words.add_later)


def _count(word: str, task: Any = None) -> None:
    words.count(word, task.id)


count = huey.task(name="count", context=True)(_count)
count_briefly = huey.task(name="count_briefly", context=True, timeout=1.5, retries=100)(_count)

if __name__ == "__main__":
    if sys.argv[1:] == ["consume"]:
        logging.basicConfig(level=logging.INFO)
        words.open_ledger()
        words.note("booted")
        consume(huey, workers=40)
    else:
        for name, number in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            for index in range(int(number)):
                globals()[name](f"{name}{index}")
