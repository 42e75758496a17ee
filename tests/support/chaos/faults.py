"""What is done to workers, connections, servers and deadlines, at random by a seed."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import gevent
from gevent.event import Event

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.chaos.places import Place
    from tests.support.proxy import Proxy

_SIGNALS: Final = {signal.SIGKILL: 3, signal.SIGTERM: 2, signal.SIGSTOP: 4}
"""What workers get, and how often in comparison."""

_CONNECTIONS: Final = (4, 4, 4, 1, 2, 1, 1, 1)
"""How often connections get what `_hurt_a_connection` can do, in comparison."""

_AIMED: Final = {
    "no-conflicts": (1, 1, 1, 0, 0, 0, 1, 1),
    "lying": (0, 1, 6, 0, 0, 0, 0, 0),
    "early": (4, 4, 1, 0, 0, 0, 1, 0),
    "forgetful": (0, 0, 0, 3, 0, 0, 1, 1),
    "trusting": (1, 1, 1, 0, 0, 0, 1, 1),
    "halves": (1, 0, 0, 0, 0, 0, 1, 1),
}
"""The same for a mutant, which is to be found soon: what lets it do harm."""


class Faults:
    """Everything that goes wrong in a round. Several greenlets make it go wrong, each at its own pace."""

    def __init__(
        self, seed: str, place: Place, proxy: Proxy, workers: Path, *, seconds: float, mutant: str | None
    ) -> None:
        self._place = place
        self._proxy = proxy
        self._workers = workers
        self._chance = random.Random(f"{seed} faults")
        self._connections = _CONNECTIONS if mutant is None else _AIMED[mutant]
        # -- mutable state ---------------------------------------------------------------------------------
        self.counts: Counter[str] = Counter()
        self._deadlocks = 0  # what the server said last
        self._over = Event()
        self._passing: list[gevent.Greenlet[..., None]] = []
        """Faults that have an end."""
        self._greenlets = [
            gevent.spawn(self._again_and_again, 0.1, self._hurt_a_connection),
            gevent.spawn(self._again_and_again, 0.5, self._hurt_a_worker),
            gevent.spawn(self._again_and_again, 0.4, self._terminate),
            gevent.spawn(self._again_and_again, max(2.0, min(seconds / 3, 10.0)), self._restart),
        ]

    def stop(self) -> None:
        """Have all go well again: what is stopped goes on, what is held is let go, no rule is left."""
        self._over.set()
        gevent.joinall(self._greenlets)
        gevent.joinall(self._passing)
        self._proxy.forget_rules()
        for one in (*self._greenlets, *self._passing):
            if isinstance(one.exception, Exception):
                raise one.exception
        self._count_deadlocks()
        names = {self._place.save: "a save with its COMMIT", self._place.load: "a load"}
        self.counts.update({f"{act}: {names[marker]}": times for (act, marker), times in self._proxy.done.items()})

    # -- inside ----------------------------------------------------------------------------------------------

    def _again_and_again(self, pause: float, hurt: Callable[[], None]) -> None:
        while not self._over.wait(pause * (0.5 + self._chance.random())):
            hurt()

    def _for_a_while(self, fault: Callable[[float], None], seconds: float) -> None:
        self._passing = [one for one in self._passing if not one.ready() or one.exception is not None]
        self._passing.append(gevent.spawn(fault, seconds))

    def _hurt_a_connection(self) -> None:
        proxy, place = self._proxy, self._place
        hurts: list[Callable[[], object]] = [
            lambda: proxy.cut_before(place.save),
            lambda: proxy.cut_during(place.save),
            lambda: proxy.cut_after(place.save, place.saved),
            lambda: proxy.drop_answer(place.save),
            lambda: proxy.cut_before(place.load),
            lambda: proxy.cut_after(place.load),
            lambda: self._for_a_while(self._hold_saves, 0.02 + 0.4 * self._chance.random()),
            lambda: self._for_a_while(self._delay, 0.1 + 0.2 * self._chance.random()),
        ]
        self._chance.choices(hurts, self._connections)[0]()

    def _hold_saves(self, seconds: float) -> None:
        """They arrive in the end, when their batches may have given up."""
        with self._proxy.hold(self._place.save):
            gevent.sleep(seconds)

    def _delay(self, seconds: float) -> None:
        """Squeeze the deadlines: each round trip takes its time."""
        self.counts["slow network"] += 1
        self._proxy.delay = 0.001 + 0.02 * self._chance.random()
        gevent.sleep(seconds)
        self._proxy.delay = 0.0

    def _hurt_a_worker(self) -> None:
        living = [int(path.name) for path in self._workers.iterdir()]
        if not living:
            return
        pid = self._chance.choice(living)
        number = self._chance.choices(list(_SIGNALS), list(_SIGNALS.values()))[0]
        if self._send(pid, number) and number == signal.SIGSTOP:
            self._for_a_while(lambda seconds: self._go_on(pid, seconds), 0.05 + 1.2 * self._chance.random() ** 2)

    def _go_on(self, pid: int, seconds: float) -> None:
        gevent.sleep(seconds)
        with suppress(ProcessLookupError):  # gunicorn has given it up
            os.kill(pid, signal.SIGCONT)

    def _send(self, pid: int, number: signal.Signals) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it has just ended
            return False
        self.counts[number.name] += 1
        return True

    def _terminate(self) -> None:
        self.counts["connections ended by the server"] += self._place.terminate(self._chance)

    def _restart(self) -> None:
        if self._place.can_restart:
            self._count_deadlocks()
            self.counts[self._place.restart(self._chance)] += 1

    def _count_deadlocks(self) -> None:
        """Count those since the last time; a server that has crashed begins anew."""
        before, self._deadlocks = self._deadlocks, self._place.deadlocks()
        since = self._deadlocks - before
        self.counts["deadlocks"] += since if since >= 0 else self._deadlocks
