"""A Dramatiq application, which adds words; run as a program, it sends messages."""

from __future__ import annotations

import sys

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import CurrentMessage

from geventbatch.integrations.dramatiq import Stop
from tests.support.programs import words

broker = RedisBroker(  # type: ignore[no-untyped-call]  # its constructor has no types
    url=words.REDIS_URL,
    namespace=words.QUEUE,
    heartbeat_timeout=1000,  # milliseconds, until the messages of a killed worker are redelivered
    maintenance_chance=1_000_000,  # of a million commands, so many look for such
)
broker.add_middleware(CurrentMessage())
broker.add_middleware(Stop())


class Tell(dramatiq.Middleware):
    """It is called before the library's own: the last that was added comes first after an event."""

    def after_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        words.note("booted")

    def before_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        words.note("ending")

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        words.note("ended")


broker.add_middleware(Tell())
dramatiq.set_broker(broker)

add = dramatiq.actor(words.add)
add_later = dramatiq.actor(words.add_later)


def _count(word: str) -> None:
    message = CurrentMessage.get_current_message()
    assert message is not None
    words.count(word, message.message_id)


count = dramatiq.actor(actor_name="count")(_count)
count_briefly = dramatiq.actor(
    actor_name="count_briefly", time_limit=1500, max_retries=100, min_backoff=10, max_backoff=100
)(_count)

if __name__ == "__main__":
    for name, number in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        for index in range(int(number)):
            broker.get_actor(name).send(f"{name}{index}")
else:
    words.open_ledger()
