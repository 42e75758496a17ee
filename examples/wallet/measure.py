"""One measurement of `compare`, in a process of its own: one way, one load. Prints one line of JSON."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import gevent
from gevent import monkey

from examples.wallet.compare import Round, read_options

Transfer = Callable[[int, int, int, UUID], object]


class Measurement:
    """Clients in a closed loop, and what they were answered."""

    def __init__(self, transfer: Transfer, options: Any) -> None:
        self._transfer = transfer
        self._options = options
        self._latencies: list[float] = []
        self._statements = 0

    def round(self, finish: Callable[[], int] | None) -> Round:
        """Run it; *finish* is called again and again until there is nothing left to finish."""
        started = time.monotonic()
        clients = [gevent.spawn(self._client, started + self._options.seconds) for _ in range(self._options.clients)]
        if finish is not None:
            while finish() or not all(client.ready() for client in clients):
                gevent.sleep(0.001)
        gevent.joinall(clients, raise_error=True)
        seconds = time.monotonic() - started
        ordered = sorted(self._latencies)
        count = len(ordered)
        return Round(count, seconds, ordered[count // 2], ordered[count * 99 // 100], self._statements)

    def count(self, execute: Callable[..., Any], *arguments: Any) -> Any:
        """Count a statement."""
        self._statements += 1
        return execute(*arguments)

    def _client(self, until: float) -> None:
        from django.db import connections

        while (started := time.monotonic()) < until or not self._latencies:
            gevent.sleep(0)  # its turn comes: a driver that never switches would let one client have them all
            source, target = self._pair()
            self._transfer(source, target, random.randint(1, 100), uuid4())
            self._latencies.append(time.monotonic() - started)
            connections.close_all()  # as at the end of a request

    def _pair(self) -> tuple[int, int]:
        most = self._options.accounts + 1
        if self._options.where == "spread":
            source, target = random.sample(range(1, most), 2)
            return source, target
        pair = (most, random.randint(1, most - 1))
        return pair if random.random() < 0.5 else pair[::-1]


def main() -> None:
    """Measure what the command line says."""
    from django.db.backends.signals import connection_created

    from examples.wallet import ordering, outbox, transfers

    ways: dict[str, Transfer] = {
        "in_one_transaction": ordering.in_one_transaction,
        "across": transfers.transfer,
        "outbox": outbox.send,
    }
    options = read_options()
    measurement = Measurement(ways[options.way], options)

    def watch(connection: Any, **_: object) -> None:
        if measurement.count not in connection.execute_wrappers:
            connection.execute_wrappers.append(measurement.count)

    connection_created.connect(watch)
    measured = measurement.round(outbox.finish if options.way == "outbox" else None)
    json.dump(measured._asdict(), sys.stdout)


if __name__ == "__main__":
    monkey.patch_all()
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.wallet.settings")
    django.setup()
    main()
