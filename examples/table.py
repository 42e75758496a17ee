"""The table of a load: a line for each of the servers that are compared."""

import math
from collections import Counter
from dataclasses import dataclass, field

COLUMNS = "{:<16}{:>9}{:>11}{:>9}{:>9}{:>12}{:>9}{:>12}{:>9}{:>11}{:>10}"
REPLAYS = "{:>9}"
TITLES = (
    "",
    "seconds",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "operations",
    "batches",
    "operations",
    "refused",
    "try again",
    "unknown",
)


@dataclass(frozen=True)
class Statuses:
    """What an application's statuses mean. A request without an answer counts as unknown too."""

    answered: tuple[str, ...]
    refused: tuple[str, ...]
    again: tuple[str, ...]
    unknown: str
    """As the column is called."""


@dataclass
class Row:
    """What one of the servers did in all its turns."""

    name: str
    meaning: Statuses
    seconds: float = 0.0
    """Of all turns, each until its last answer."""
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    batches: int = 0
    replays: int | None = None
    """Only where they are counted."""

    def add(
        self, seconds: float, latencies: list[float], statuses: Counter[str], operations: int, batches: int
    ) -> None:
        """Count another turn."""
        self.seconds += seconds
        self.latencies += latencies
        self.statuses += statuses
        self.operations += operations
        self.batches += batches

    def __str__(self) -> str:
        meaning = self.meaning
        known = (*meaning.answered, *meaning.refused, *meaning.again)
        line = COLUMNS.format(
            self.name,
            f"{self.seconds:.1f}",
            f"{len(self.latencies) / self.seconds:,.0f}",
            f"{self._percentile(50) * 1000:.1f}",
            f"{self._percentile(99) * 1000:.1f}",
            f"{self.operations:,}",
            f"{self.batches:,}",
            f"{self.operations / max(1, self.batches):.1f}",
            f"{self._count(meaning.refused):,}",
            f"{self._count(meaning.again):,}",
            f"{self.statuses.total() - self._count(known):,}",
        )
        return line if self.replays is None else line + REPLAYS.format(f"{self.replays:,}")

    def _count(self, statuses: tuple[str, ...]) -> int:
        return sum(self.statuses[status] for status in statuses)

    def _percentile(self, percent: int) -> float:
        ordered = sorted(self.latencies) or [math.nan]
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def show(rows: list[Row], counted: str = "saved") -> None:
    """Print them under their titles; *counted* says which operations and batches were."""
    meaning = rows[0].meaning
    statuses = map(", ".join, (meaning.refused, meaning.again))
    below = ("", "measured", "answered", "", "", counted, counted, "per batch", *statuses)
    titles = COLUMNS.format(*TITLES) + ("" if rows[0].replays is None else REPLAYS.format("replays"))
    print("", titles, COLUMNS.format(*below, meaning.unknown), *rows, "", sep="\n")
