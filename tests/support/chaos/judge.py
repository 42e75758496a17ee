"""What has to be there after all, by what the clients were told."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support.chaos.clients import Entry
    from tests.support.chaos.places import Beside, Found

LOST: Final = "acknowledged, but not there"
TWICE: Final = "there more than once"
MISPLACED: Final = "there, but not at the place that was told"
HALF: Final = "there at some of its keys, but not at all of them"
LIED: Final = "refused with retry_safe, but there"
UNASKED: Final = "there, but nobody has asked for it"
BOOKS: Final = "an account has something else in it than its lines say"
SUM: Final = "the sum of all accounts has changed"
BESIDE: Final = "the rows beside the resources tell another story"


def broken_rules(entries: Iterable[Entry], found: Found, beside: Beside | None) -> Iterator[str]:
    """One line for each entry that breaks a rule."""
    asked: dict[str, set[str]] = {}
    places: dict[tuple[str, str], list[int]] = {}
    for key, names in found.items():
        for place, name in enumerate(names, 1):
            places.setdefault((key, name), []).append(place)
    for entry in entries:
        for key in entry.keys:
            asked.setdefault(key, set()).add(entry.name)
        rule = _broken_rule(entry, [places.get((key, entry.name), []) for key in entry.keys])
        if rule is not None:
            keys = ", ".join(map(repr, entry.keys))
            yield f"{rule}: {entry.name!r} at {keys}, which was told: {', '.join(entry.answers)}"
    for key, names in found.items():
        yield from (f"{UNASKED}: {name!r} at {key!r}" for name in names if name not in asked.get(key, ()))
    if beside is not None:
        there = {key: Counter(names) for key, names in found.items() if names}
        yield from (f"{BESIDE}: {key!r}" for key in {*there, *beside} if there.get(key) != beside.get(key))


def unknown_but_there(entries: Iterable[Entry], found: Found) -> int:
    """How many entries are there of which their clients do not know it."""
    there = {(key, name) for key, names in found.items() for name in names}
    return sum(entry.told == "unknown" and (entry.keys[0], entry.name) in there for entry in entries)


def _broken_rule(entry: Entry, places: list[list[int]]) -> str | None:
    """Say which rule is broken by its *places* at each of its keys."""
    if any(len(some) > 1 for some in places):
        return TWICE
    if any(places) and not all(places):
        return HALF
    is_there = all(places)
    if entry.told == "saved" and not is_there:
        return LOST
    if entry.told == "saved" and [place for some in places for place in some] != entry.places:
        return MISPLACED
    if entry.told == "refused" and is_there:
        return LIED
    return None


# -- accounts: each line is the name of a transfer, what it has put into the account, and what is in it since ---------


def names_of(accounts: Found) -> Found:
    """Give the names of all transfers of each account."""
    return {key: [_Line.of(text).name for text in lines] for key, lines in accounts.items()}


def broken_books(accounts: Found) -> Iterator[str]:
    """Tell of accounts that have something else in them than their lines have put there, and of lost money."""
    total = 0
    for key, lines in accounts.items():
        balance = 0
        for line in map(_Line.of, lines):
            balance += line.amount
            if line.balance != balance:
                yield f"{BOOKS}: {key!r} has {line.balance} after {line.name!r}, but {balance} by its lines"
                break
        total += balance
    if total:
        yield f"{SUM}: {total:+d}"


class _Line(NamedTuple):
    name: str
    amount: int
    balance: int

    @classmethod
    def of(cls, text: str) -> _Line:
        name, amount, balance = text.split()
        return cls(name, int(amount), int(balance))
