"""Clients that add uniquely named entries, and keep what they were told about each."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal

import gevent

from examples.client import Connection
from tests.support.chaos.settings import DEADLINES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Told = Literal["saved", "refused", "unknown"]
Kind = Literal["once", "again", "idempotent", "foreign"]

_KINDS: Final[tuple[Kind, ...]] = ("once", "again", "idempotent")

HOT_KEYS: Final = 4
HOT_ACCOUNTS: Final = 20
ENTRIES_OF_A_KEY: Final = 150
"""So many are asked for before another key takes its place: documents stay small."""

_SIZES: Final = {1: 2, 2: 6, 3: 1, 5: 1}
"""In how many accounts an entry is, and how often in comparison."""

_FAILING: Final = 0.2
"""The part of the transfers that are asked for once, and then raise half-way."""

PATIENCE: Final = 10.0
"""Seconds after which a client leaves; some leave sooner."""


@dataclass(eq=False, slots=True)
class Entry:
    """A name that is to be at a key, and the way it took."""

    name: str
    keys: Sequence[str]
    kind: Kind
    answers: list[str] = field(default_factory=list)
    """What was told each time, in words."""
    told: Told = "refused"
    """What it comes to."""
    places: list[int] = field(default_factory=list)
    """Which one of each key it was told to be."""


class Clients:
    """All clients of a round."""

    def __init__(
        self, address: tuple[str, int], seed: str, *, count: int, idempotent: bool, transfers: bool = False
    ) -> None:
        self._address = address
        self._seed = seed
        self._idempotent = idempotent
        self._transfers = transfers
        # -- mutable state ---------------------------------------------------------------------------------
        self.entries: list[Entry] = []
        self.counts: Counter[str] = Counter()
        """How often each answer was given."""
        self.untyped: list[str] = []
        """Answers that a client can make nothing of."""
        self.squeezed = 0
        """Entries that were asked for with a deadline that few batches can keep."""
        self._stopping = False
        self._greenlets = [gevent.spawn(self._work, number) for number in range(count)]

    def stop(self, seconds: float) -> bool:
        """Ask for nothing new. True when all clients know what they have to know within *seconds*."""
        self._stopping = True
        gevent.joinall(self._greenlets, timeout=seconds)
        ended = all(one.ready() for one in self._greenlets)
        for one in self._greenlets:
            if one.ready():
                one.get()
        gevent.killall(self._greenlets)
        return ended

    def add_lone_entries(self, seconds: float) -> list[str]:
        """Add one entry to each hot key, in peace. Gives the keys at which that does not succeed in time."""
        client = _Client(self, random.Random(0), "peace")
        stuck = []
        hot = self.hot_keys()
        for keys in [(key,) for key in hot] + ([hot] if self._transfers else []):
            timeout = gevent.Timeout.start_new(seconds)
            try:
                while client.add(keys, "again", "calm") != "saved":
                    continue
            except gevent.Timeout:  # there is no other one
                stuck.append(", ".join(keys))
            finally:
                timeout.close()
        client.close()
        return stuck

    def hot_keys(self) -> list[str]:
        """Give those that are used at present."""
        hot = HOT_ACCOUNTS if self._transfers else HOT_KEYS
        generation = len(self.entries) // (hot * ENTRIES_OF_A_KEY)
        return [f"key {generation}-{number}" for number in range(hot)]

    # -- inside ----------------------------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        chance = random.Random(f"{self._seed} client {number}")
        client = _Client(self, chance, str(number))
        while not self._stopping:
            kind = chance.choices(_KINDS, (1, 1, 2 if self._idempotent else 0))[0]
            deadline = chance.choices(list(DEADLINES), (6, 2, 1))[0]
            size = chance.choices(list(_SIZES), list(_SIZES.values()))[0] if self._transfers else 1
            client.add(chance.sample(self.hot_keys(), size), kind, deadline)
        client.close()


class _Client:
    """One of them, with its kept connection."""

    def __init__(self, clients: Clients, chance: random.Random, name: str) -> None:
        self._clients = clients
        self._chance = chance
        self._names = self._named(name)
        self._connection = Connection(*clients._address)

    def close(self) -> None:
        self._connection.close()

    def add(self, keys: Sequence[str], kind: Kind, deadline: str) -> Told:
        """Give what it comes to. Ask once, or again and again until it is known, as the kind of the entry says."""
        entry = Entry(next(self._names), keys, kind)
        self._clients.entries.append(entry)
        asked: dict[str, Any] = {"keys": keys, "name": entry.name, "deadline": deadline}
        if len(keys) > 1:
            asked["amount"] = self._chance.randint(1, 100)
            asked["fails"] = kind == "once" and self._chance.random() < _FAILING
        if kind == "idempotent":
            asked["idempotency_key"] = entry.name
        self._clients.squeezed += deadline != "calm"
        if self._chance.random() < 0.05:
            asked["start_timeout"] = 0.01
        while True:
            entry.told = "unknown"  # should this be killed while it waits
            entry.told, answer = self._ask(asked, entry)
            entry.answers.append(answer)
            self._clients.counts[answer] += 1
            if entry.told == "saved":
                return entry.told
            gevent.sleep(0.005 + 0.05 * self._chance.random())
            if kind == "once" or (kind == "again" and entry.told == "unknown"):
                return entry.told
            asked["deadline"] = "calm"
            asked.pop("start_timeout", None)

    def _ask(self, asked: dict[str, Any], entry: Entry) -> tuple[Told, str]:
        """What came of asking once, also in words."""
        leaving = gevent.Timeout.start_new(0.02 if self._chance.random() < 0.01 else PATIENCE)
        try:
            return self._answer(asked, entry)
        except gevent.Timeout as timeout:
            if timeout is not leaving:
                raise
            self._connection.close()
            return "unknown", "unknown: the client left"
        finally:
            leaving.close()

    def _answer(self, asked: dict[str, Any], entry: Entry) -> tuple[Told, str]:
        try:
            self._connection._open()
        except OSError:  # nothing was sent
            self._connection.close()
            return "refused", "refused: no connection"
        try:
            status, body = self._connection.ask("POST", "/", asked)
        except OSError:
            return "unknown", "unknown: no reply"
        except ValueError:
            self._connection.close()
            self._clients.untyped.append(f"{entry.name!r} at {entry.keys!r} was answered by no JSON")
            return "unknown", "unknown: untyped"
        if status == HTTPStatus.OK:
            entry.places = body["places"]
            return "saved", "saved"
        told: Told = "refused" if body["retry_safe"] else "unknown"
        return told, f"{told}: {body['error']}"

    def _named(self, name: str) -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"{name}-{number}"
