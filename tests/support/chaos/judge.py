"""What has to be there after all, by what the clients were told."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support.chaos.clients import Entry
    from tests.support.chaos.places import Beside, Found

LOST: Final = "acknowledged, but not there"
TWICE: Final = "there more than once"
MISPLACED: Final = "there, but not at the place that was told"
LIED: Final = "refused with retry_safe, but there"
UNASKED: Final = "there, but nobody has asked for it"
BESIDE: Final = "the rows beside the resources tell another story"


def broken_rules(entries: Iterable[Entry], found: Found, beside: Beside | None) -> Iterator[str]:
    """One line for each entry that breaks a rule."""
    asked: dict[str, set[str]] = {}
    places: dict[tuple[str, str], list[int]] = {}
    for key, names in found.items():
        for place, name in enumerate(names, 1):
            places.setdefault((key, name), []).append(place)
    for entry in entries:
        asked.setdefault(entry.key, set()).add(entry.name)
        rule = _broken_rule(entry, places.get((entry.key, entry.name), []))
        if rule is not None:
            yield f"{rule}: {entry.name!r} at {entry.key!r}, which was told: {', '.join(entry.answers)}"
    for key, names in found.items():
        yield from (f"{UNASKED}: {name!r} at {key!r}" for name in names if name not in asked.get(key, ()))
    if beside is not None:
        there = {key: Counter(names) for key, names in found.items() if names}
        yield from (f"{BESIDE}: {key!r}" for key in {*there, *beside} if there.get(key) != beside.get(key))


def unknown_but_there(entries: Iterable[Entry], found: Found) -> int:
    """How many entries are there of which their clients do not know it."""
    there = {(key, name) for key, names in found.items() for name in names}
    return sum(entry.told == "unknown" and (entry.key, entry.name) in there for entry in entries)


def _broken_rule(entry: Entry, places: list[int]) -> str | None:
    if len(places) > 1:
        return TWICE
    if entry.told == "saved" and not places:
        return LOST
    if entry.told == "saved" and places != [entry.place]:
        return MISPLACED
    if entry.told == "refused" and places:
        return LIED
    return None
