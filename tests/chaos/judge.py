"""What has to be there after all, by what the clients were told."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.chaos.clients import Entry
    from tests.chaos.places import Found

LOST: Final = "acknowledged, but not there"
TWICE: Final = "there more than once"
LIED: Final = "refused with retry_safe, but there"
UNASKED: Final = "there, but nobody has asked for it"
BESIDE: Final = "the rows beside the resources tell another story"


def broken_rules(entries: Iterable[Entry], found: Found, beside: Found | None) -> Iterator[str]:
    """One line for each entry that breaks a rule."""
    asked: dict[str, set[str]] = {}
    for entry in entries:
        asked.setdefault(entry.key, set()).add(entry.name)
        rule = _broken_rule(entry, found.get(entry.key, Counter())[entry.name])
        if rule is not None:
            yield f"{rule}: {entry.name!r} at {entry.key!r}, which was told: {', '.join(entry.answers)}"
    for key, names in found.items():
        yield from (f"{UNASKED}: {name!r} at {key!r}" for name in names if name not in asked.get(key, ()))
    if beside is not None:
        there = {key: names for key, names in found.items() if names}
        yield from (f"{BESIDE}: {key!r}" for key in {*there, *beside} if there.get(key) != beside.get(key))


def unknown_but_there(entries: Iterable[Entry], found: Found) -> int:
    """How many entries are there of which their clients do not know it."""
    return sum(entry.told == "unknown" and entry.name in found.get(entry.key, ()) for entry in entries)


def _broken_rule(entry: Entry, times: int) -> str | None:
    if times > 1:
        return TWICE
    if entry.told == "saved" and not times:
        return LOST
    if entry.told == "refused" and times:
        return LIED
    return None
