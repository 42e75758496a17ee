"""The numbers that a page remembers of each processor that it shows, and how it reads the present state.

A page keeps one bucket for each second of the last minute, so its size does not grow.
"""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections import Counter, deque
from heapq import nsmallest
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from geventbatch import _seam
from geventbatch._core import process
from geventbatch._core.clock import clock
from geventbatch._watch.stats import before_of, live_batch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from geventbatch._core.batch import Batch
    from geventbatch._processor import Processor
    from geventbatch._watch.metrics import BatchMetric
    from geventbatch._watch.stats import LiveBatch

SPAN: Final = 60
"""The seconds that a page looks back on."""

RATE_SPAN: Final = 10
"""The seconds over which a rate is taken."""

LONG: Final = 1.0
"""The seconds after which a running batch counts as hanging."""

KEYS: Final = 128
"""Keys counted by name in each ten seconds. Each count is too low by less than a 128th of all."""

_SLICE: Final = 10
SIZES: Final = 14
_MOST_HANGING: Final = 20
_MOST_KEYS: Final = 10
_MOST_FAILED: Final = 20
_MOST_STRANGE: Final = 1024
LONGEST: Final = 300
"""The most characters shown of a key, a name or an error."""
MOST_WAITING: Final = 10
"""Operations across keys that are shown as they wait."""
NEARLY_ALL: Final = 0.8
"""The share of operations at one key that the page tells of."""


PARTS: Final = ("queue wait", "load", "operations", "save", "other")

_PLAIN: Final = frozenset({str, bytes, int, float, bool, type(None), uuid.UUID, decimal.Decimal, dt.date, dt.datetime})
"""Types whose ``__hash__`` and ``__eq__`` cannot switch."""


def _is_plain(key: Any) -> bool:
    kind = type(key)
    return kind in _PLAIN or (kind is tuple and all(map(_is_plain, key)))


class _Second:
    """The batches that ended within one second."""

    __slots__ = ("across", "at", "batches", "conflicts", "failed", "operations", "parts", "raised", "sizes")

    def __init__(self, at: int) -> None:
        self.at = at
        # -- mutable state ---------------------------------------------------------------------------------
        self.batches = self.operations = self.raised = self.conflicts = self.failed = 0
        self.across = 0  # operations in batches of several keys
        self.sizes = [0] * SIZES  # batches by the bits of their number of operations
        self.parts = [0.0] * len(PARTS)  # seconds


class _Keys:
    """The operations of the hottest keys within ten seconds, by Misra and Gries."""

    __slots__ = ("at", "counts", "total")

    def __init__(self, at: int) -> None:
        self.at = at
        # -- mutable state ---------------------------------------------------------------------------------
        self.total = 0  # operations of all keys
        self.counts: dict[Hashable, int] = {}

    def add(self, key: Hashable, operations: int) -> None:
        """Count the operations. If there are too many keys, drop the keys with the lowest counts.

        The highest dropped count is subtracted from the others.
        """
        counts = self.counts
        counts[key] = counts.get(key, 0) + operations
        if len(counts) >= 2 * KEYS:
            ranked = sorted(counts.items(), key=itemgetter(1), reverse=True)
            least = ranked[KEYS][1]
            self.counts = {key: count - least for key, count in ranked[:KEYS] if count > least}


class _Failed(NamedTuple):
    """A batch that failed as a whole."""

    at: float
    keys: tuple[Hashable, ...]
    operation: str | None
    operations: int
    phase: str | None
    kind: str
    told: str
    retry_safe: bool


class Seen:
    """The numbers that a page has seen of one processor, as its watcher.

    It takes no lock. Threads share it with ``batching=False``; they may lose a count, but nothing else. `publish` runs
    no code of the user's.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._epoch = process.here.epoch
        # -- mutable state ---------------------------------------------------------------------------------
        self._began = clock.monotonic()
        self._seconds = [_Second(-SPAN - 1)] * (SPAN + 1)
        self._keys: deque[_Keys] = deque([_Keys(-SPAN)], maxlen=SPAN // _SLICE)
        self._strange: deque[tuple[int, Hashable, int]] = deque(maxlen=_MOST_STRANGE)  # of users' classes
        self._failed: deque[_Failed] = deque(maxlen=_MOST_FAILED)

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """Count *metric*, of *batch*. Switches: no."""
        self._count(metric, batch.count_keys(metric.operation_count))

    def publish(self, metric: BatchMetric) -> None:
        """Count *metric*, of a batch of one key. Switches: no."""
        self._count(metric, ((metric.key, metric.operation_count),))

    def _count(self, metric: BatchMetric, counts: Iterable[tuple[Hashable, int]]) -> None:
        if self._epoch != process.here.epoch:
            self._restart()
        now = int(clock.monotonic())
        second = self._seconds[now % (SPAN + 1)]
        if second.at != now:
            second = self._seconds[now % (SPAN + 1)] = _Second(now)
        operations = metric.operation_count
        second.batches += 1
        second.operations += operations
        second.raised += metric.raised
        second.conflicts += metric.conflicts
        second.sizes[min(operations.bit_length(), SIZES - 1)] += 1
        load, apply, save = metric.load_duration, metric.apply_duration, metric.save_duration
        parts = second.parts
        parts[0] += metric.queue_wait
        parts[1] += load
        parts[2] += apply
        parts[3] += save
        parts[4] += max(0.0, metric.total_duration - load - apply - save)
        if len(metric.keys) > 1:
            second.across += operations
        self._count_keys(now, counts, operations)
        if metric.error is not None:
            second.failed += 1
            self._keep_failed(metric)

    def close(self) -> None:
        """Do nothing: the numbers go out of date by themselves. Switches: no."""

    def _count_keys(self, now: int, counts: Iterable[tuple[Hashable, int]], operations: int) -> None:
        keys = self._keys[-1]
        if keys.at + _SLICE <= now:
            keys = _Keys(now - now % _SLICE)
            self._keys.append(keys)
        if not operations:
            return
        keys.total += operations
        for key, count in counts:
            if not count:
                continue
            if type(key) is str or _is_plain(key):
                keys.add(key, count)
            else:
                self._strange.append((now, key, count))

    def _keep_failed(self, metric: BatchMetric) -> None:
        error: Any = metric.error
        self._failed.append(
            _Failed(
                metric.started_at + metric.total_duration,
                metric.keys or (metric.key,),
                metric.operation_name,
                metric.operation_count,
                metric.phase,
                type(error).__name__,
                str(error)[: LONGEST + 1],
                error.retry_safe,
            )
        )

    def now(self) -> Minute:
        """Return the sums of the last minute. Switches: no."""
        if self._epoch != process.here.epoch:
            self._restart()
        now = int(clock.monotonic())
        seconds = [second for second in self._seconds if 0 <= now - second.at <= SPAN]
        span = min(RATE_SPAN, max(1, now - int(self._began)))
        recent = [second for second in seconds if 0 < now - second.at <= span]
        slices = [keys for keys in tuple(self._keys) if now - keys.at <= SPAN]
        line = dict.fromkeys(range(now - SPAN, now), 0)
        line.update((second.at, second.operations) for second in seconds if second.at < now)
        return Minute(
            watched=clock.monotonic() - self._began,
            operations_rate=sum(second.operations for second in recent) / span,
            batches_rate=sum(second.batches for second in recent) / span,
            line=list(line.values()),
            operations=sum(second.operations for second in seconds),
            across=sum(second.across for second in seconds),
            batches=sum(second.batches for second in seconds),
            raised=sum(second.raised for second in seconds),
            conflicts=sum(second.conflicts for second in seconds),
            failed=sum(second.failed for second in seconds),
            sizes=[sum(column) for column in zip(*(second.sizes for second in seconds), strict=True)] or [0] * SIZES,
            parts=[sum(column) for column in zip(*(second.parts for second in seconds), strict=True)]
            or [0.0] * len(PARTS),
            counted=[tuple(keys.counts.items()) for keys in slices],
            counted_in_all=sum(keys.total for keys in slices),
            strange=[(key, count) for at, key, count in tuple(self._strange) if now - at <= SPAN],
            failures=list(self._failed)[::-1],
        )


class Minute(NamedTuple):
    """The numbers to show. A rate is over `RATE_SPAN`, everything else over `SPAN`."""

    watched: float
    operations_rate: float
    batches_rate: float
    line: list[int]  # operations by second, the latest last
    operations: int
    across: int
    batches: int
    raised: int
    conflicts: int
    failed: int
    sizes: list[int]
    parts: list[float]
    counted: list[tuple[tuple[Hashable, int], ...]]
    counted_in_all: int
    strange: list[tuple[Hashable, int]]
    failures: list[_Failed]

    def hottest(self) -> list[tuple[Hashable, int]]:
        """Return the keys with the most operations. Switches: only if ``__hash__`` or ``__eq__`` of a key does."""
        sums: dict[Hashable, int] = {}
        for counts in (*self.counted, self.strange):
            for key, count in counts:
                try:
                    sums[key] = sums.get(key, 0) + count
                except Exception:  # noqa: S112 - a user's key that cannot be counted
                    continue
        return sorted(sums.items(), key=itemgetter(1), reverse=True)[:_MOST_KEYS]


class Live(NamedTuple):
    """The batches that run or wait at this moment."""

    queued: int
    running: int
    oldest: float | None  # seconds that the first queued batch has waited
    hanging: int
    shown: list[tuple[int, LiveBatch]]
    blocked: int  # operations across keys that wait at a key for others
    waiting: list[LiveBatch]  # the first of these
    crowded: Hashable  # the key at which most of these wait
    crowd: int  # how many wait there


def live_of(processor: Processor[Any]) -> Live:
    """Read the live batches once, and the details of a few that hang. Switches: no."""
    state = _seam.dispatcher_of(processor)
    now = clock.monotonic()
    queued, oldest = 0, now
    running = []
    blocked = []
    for batch in state.batches():
        attempt = batch.attempt  # once: in another thread it may be gone the next moment
        if attempt is not None:
            running.append((attempt.started, batch))
        else:
            queued += 1
            if len(batch.nodes) > 1:
                before = before_of(batch)
                if before:
                    blocked.append((batch.opened, batch, before))
            if batch.opened < oldest:  # noqa: PLR1730 - min() costs more than all the rest
                oldest = batch.opened
    at = Counter(id(key) for _, _, before in blocked for key, _ in before)  # by identity: no code of the user's runs
    most, crowd = at.most_common(1)[0] if at else (0, 0)
    crowded = next((key for _, _, before in blocked for key, _ in before if id(key) == most), None)
    hanging = [(started, batch) for started, batch in running if batch.overdue or now - started >= LONG]
    return Live(
        queued=queued,
        running=len(running),
        oldest=now - oldest if queued else None,
        hanging=len(hanging),
        shown=[(id(batch), live_batch(batch)) for _, batch in nsmallest(_MOST_HANGING, hanging, key=_started)],
        blocked=len(blocked),
        waiting=[live_batch(batch) for _, batch, _ in nsmallest(MOST_WAITING, blocked, key=itemgetter(0))],
        crowded=crowded,
        crowd=crowd,
    )


def _started(found: tuple[float, Batch]) -> float:
    return found[0]
