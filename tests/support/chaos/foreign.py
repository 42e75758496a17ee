"""Foreign writers, which know nothing of batches: they move money, and lock accounts in the other order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import gevent

from tests.support.chaos.clients import Entry

if TYPE_CHECKING:
    from tests.support.chaos.clients import Clients
    from tests.support.chaos.places import Place

_WRITERS: Final = 2
_PAUSE: Final = 0.05
"""Seconds between two transfers of one writer, in the mean."""
_HELD: Final = 0.03
"""Seconds between two locks of one transfer, at most."""


class ForeignWriters:
    """Some that move money between the accounts of *clients*, among whose entries theirs are."""

    def __init__(self, seed: str, place: Place, clients: Clients) -> None:
        self._place = place
        self._clients = clients
        # -- mutable state ---------------------------------------------------------------------------------
        self._stopping = False
        self._greenlets = [gevent.spawn(self._work, f"{seed} foreign {number}", number) for number in range(_WRITERS)]

    def stop(self) -> None:
        """Write nothing more."""
        self._stopping = True
        for one in gevent.joinall(self._greenlets):
            one.get()

    def _work(self, seed: str, number: int) -> None:
        chance = random.Random(seed)
        count = 0
        while not self._stopping:
            gevent.sleep(2 * _PAUSE * chance.random())
            count += 1
            entry = Entry(f"foreign-{number}-{count}", chance.sample(self._clients.hot_keys(), 2), "foreign")
            self._clients.entries.append(entry)
            answer = self._place.move(entry, chance.randint(1, 100), _HELD * chance.random())
            entry.answers.append(answer)
            self._clients.counts[f"of a foreign writer: {answer}"] += 1
