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
    from collections.abc import Iterator

Told = Literal["saved", "refused", "unknown"]
Kind = Literal["once", "again", "idempotent"]

_KINDS: Final[tuple[Kind, ...]] = ("once", "again", "idempotent")

HOT_KEYS: Final = 4
ENTRIES_OF_A_KEY: Final = 150
"""So many are asked for before another key takes its place: documents stay small."""

PATIENCE: Final = 10.0
"""Seconds after which a client leaves; some leave sooner."""


@dataclass(eq=False, slots=True)
class Entry:
    """A name that is to be at a key, and the way it took."""

    name: str
    key: str
    kind: Kind
    answers: list[str] = field(default_factory=list)
    """What was told each time, in words."""
    told: Told = "refused"
    """What it comes to."""
    place: int = 0
    """Which one of its key it was told to be."""


class Clients:
    """All clients of a round."""

    def __init__(self, address: tuple[str, int], seed: str, *, count: int, idempotent: bool) -> None:
        self._address = address
        self._seed = seed
        self._idempotent = idempotent
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
        for key in self._hot_keys():
            timeout = gevent.Timeout.start_new(seconds)
            try:
                while client.add(key, "again", "calm") != "saved":
                    continue
            except gevent.Timeout:  # there is no other one
                stuck.append(key)
            finally:
                timeout.close()
        client.close()
        return stuck

    # -- inside ----------------------------------------------------------------------------------------------

    def _hot_keys(self) -> list[str]:
        generation = len(self.entries) // (HOT_KEYS * ENTRIES_OF_A_KEY)
        return [f"key {generation}-{number}" for number in range(HOT_KEYS)]

    def _work(self, number: int) -> None:
        chance = random.Random(f"{self._seed} client {number}")
        client = _Client(self, chance, str(number))
        while not self._stopping:
            kind = chance.choices(_KINDS, (1, 1, 2 if self._idempotent else 0))[0]
            deadline = chance.choices(list(DEADLINES), (6, 2, 1))[0]
            client.add(chance.choice(self._hot_keys()), kind, deadline)
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

    def add(self, key: str, kind: Kind, deadline: str) -> Told:
        """Give what it comes to. Ask once, or again and again until it is known, as the kind of the entry says."""
        entry = Entry(next(self._names), key, kind)
        self._clients.entries.append(entry)
        asked: dict[str, Any] = {"key": key, "name": entry.name, "deadline": deadline}
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
            self._clients.untyped.append(f"{entry.name!r} at {entry.key!r} was answered by no JSON")
            return "unknown", "unknown: untyped"
        if status == HTTPStatus.OK:
            entry.place = body["place"]
            return "saved", "saved"
        told: Told = "refused" if body["retry_safe"] else "unknown"
        return told, f"{told}: {body['error']}"

    def _named(self, name: str) -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"{name}-{number}"
