"""What may happen to a train. Knows nothing of batches, databases or HTTP.

Every operation checks first and changes then: one that raises has left the train as it was, which is what lets a batch
go on with the operations of everybody else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_NAME = 80


class Refused(Exception):
    """What was asked for cannot be done, and nothing was changed."""


class UnknownTrain(Refused):
    """There is no such train."""


class UnknownSeat(Refused):
    """The train has no such seat."""


class SeatTaken(Refused):
    """Somebody holds the seat already."""


class NotTheHolder(Refused):
    """Only who holds a seat may cancel it."""


class BadName(Refused):
    """A passenger needs a name, and not a novel."""


@dataclass(frozen=True)
class Ticket:
    """A seat, and who holds it."""

    train: str
    seat: int
    passenger: str


@dataclass
class Train:
    """The seats of one train, numbered from 1; None is a free one."""

    name: str
    seats: list[str | None]
    changes: int = 0
    """How many bookings and cancellations it took to get here."""

    @classmethod
    def empty(cls, name: str, seat_count: int) -> "Train":
        """A train that nobody has booked yet."""
        return cls(name, [None] * seat_count)

    def book(self, seat: int, passenger: str) -> Ticket:
        """Give a free seat to *passenger*."""
        ticket = Ticket(self.name, seat, _name(passenger))
        if self.holder(seat) is not None:
            raise SeatTaken(f"seat {seat} of {self.name} is taken")
        self._put(seat, ticket.passenger)
        return ticket

    def cancel(self, seat: int, passenger: str) -> Ticket:
        """Set free a seat that *passenger* holds."""
        ticket = Ticket(self.name, seat, _name(passenger))
        if self.holder(seat) != ticket.passenger:
            raise NotTheHolder(f"{ticket.passenger} does not hold seat {seat} of {self.name}")
        self._put(seat, None)
        return ticket

    def holder(self, seat: int) -> str | None:
        """Who holds *seat*; None when it is free."""
        if not 1 <= seat <= len(self.seats):
            raise UnknownSeat(f"{self.name} has no seat {seat}, only 1 to {len(self.seats)}")
        return self.seats[seat - 1]

    def _put(self, seat: int, holder: str | None) -> None:
        self.seats[seat - 1] = holder
        self.changes += 1


def taken(seats: Sequence[str | None]) -> dict[int, str]:
    """The seats that somebody holds, by number."""
    return {seat: holder for seat, holder in enumerate(seats, start=1) if holder is not None}


def _name(passenger: str) -> str:
    name = passenger.strip()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise BadName(f"a passenger's name has 1 to {LONGEST_NAME} printable characters")
    return name
