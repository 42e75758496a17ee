"""One round: servers, workers and clients in the middle of faults; then peace; then the judge."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import gevent

from examples.server import Server
from tests.support.chaos.clients import Clients
from tests.support.chaos.faults import Faults
from tests.support.chaos.foreign import ForeignWriters
from tests.support.chaos.judge import broken_books, broken_rules, names_of, unknown_but_there
from tests.support.chaos.places import parts_of, place_of
from tests.support.chaos.settings import Settings
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIGURATION = Path(__file__).with_name("gunicorn.conf.py")

IN_PEACE = 30.0
"""Seconds in which everything has to work again, and everybody to know what became of their entries."""


@dataclass(frozen=True)
class Outcome:
    """The counts of a round, or of several."""

    told: Counter[str] = field(default_factory=Counter)
    """Entries, by the kind of their clients and what these were told in the end."""
    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    broken: tuple[str, ...] = ()

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.told + other.told, self.answers + other.answers, self.faults + other.faults, self.broken + other.broken
        )

    def line(self) -> str:
        entries = sum(number for what, number in self.told.items() if not what.startswith("of which"))
        faults = sum(self.faults.values())
        return f"{entries:,} entries, {faults:,} faults, {len(self.broken)} broken rules"

    def table(self) -> str:
        parts = (("entries", self.told), ("answers", self.answers), ("faults", self.faults))
        return "\n".join(line for title, counts in parts for line in _lines(title, counts))


def _lines(title: str, counts: Counter[str]) -> Iterator[str]:
    yield f"  {title}"
    for what, number in sorted(counts.items()):
        yield f"    {number:>9,}  {what}"


def play(
    store: str, seed: str, seconds: float, *, mutant: str | None = None, clients: int = 24, idempotent: bool = True
) -> Outcome:
    """Play one round."""
    store, transfers = parts_of(store)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    (directory / "workers").mkdir()
    with place_of(store) as place:
        with Proxy(place.endpoint) as proxy:
            settings = Settings(
                store=store,
                url=place.url(proxy),
                directory=str(directory),
                mutant=mutant,
                idempotent=idempotent,
                transfers=transfers,
            )
            with Server(CONFIGURATION, settings.environment(), log=directory / "gunicorn.log") as server:
                asking = Clients(
                    (server.host, server.port), seed, count=clients, idempotent=idempotent, transfers=transfers
                )
                faults = Faults(seed, place, proxy, directory / "workers", seconds=seconds, mutant=mutant)
                foreign = ForeignWriters(seed, place, asking) if transfers and place.locks else None
                gevent.sleep(seconds)
                if foreign is not None:
                    foreign.stop()
                faults.stop()
                ended = asking.stop(IN_PEACE)
                stuck = asking.add_lone_entries(IN_PEACE)
        place.settle()
        found, beside = place.read(), place.read_beside()
    books = list(broken_books(found)) if transfers else []
    found = names_of(found) if transfers else found
    broken = [
        *books,
        *broken_rules(asking.entries, found, beside),
        *asking.untyped,
        *(f"{key!r} takes no entries any more" for key in stuck),
        *(() if ended else ("some clients never learned what became of their entries",)),
    ]
    told = Counter(f"{entry.kind}: {entry.told}" for entry in asking.entries)
    told["of which, unknown and there"] = unknown_but_there(asking.entries, found)
    told["of which, idempotent and unknown for a while"] = sum(
        entry.kind == "idempotent" and any(answer.startswith("unknown") for answer in entry.answers)
        for entry in asking.entries
    )
    told["of which, with a squeezed deadline"] = asking.squeezed
    if broken:
        broken.append(f"the log: {directory / 'gunicorn.log'}")
    else:
        shutil.rmtree(directory)
    return Outcome(told, asking.counts, faults.counts, tuple(broken))
