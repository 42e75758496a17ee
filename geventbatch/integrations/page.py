"""A page of what the processors do at this moment, for one's own admin: a WSGI application in one file.

    page = Page(allow=lambda environ: environ.get("REMOTE_ADDR") == "127.0.0.1")

It shows rates, the hottest keys, how big batches are, where their time goes, what hangs and since when, and what has
failed of late. It knows of the process that answers: under several workers each has numbers of its own. docs/page.md
says how it is mounted.

What is kept of a batch when it ends has a size that does not grow: the last minute in buckets of a second.
"""

from __future__ import annotations

import datetime as dt
import decimal
import os
import time
import uuid
from base64 import b64encode
from collections import deque
from hashlib import sha256
from heapq import nsmallest
from html import escape
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary, WeakMethod, finalize

from geventbatch import _process, _seam
from geventbatch._check import check
from geventbatch._clock import clock
from geventbatch._live import live_batch
from geventbatch._processor import Processor
from geventbatch._shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIEnvironment

    from geventbatch._batch import Batch
    from geventbatch._live import LiveBatch, ProcessorStats
    from geventbatch._metrics import BatchMetric

__all__ = ["Page"]

SPAN: Final = 60
"""Seconds that are looked back on."""

RATE_SPAN: Final = 10
"""Seconds that a rate is of."""

LONG: Final = 1.0
"""Seconds from which on a running batch is said to hang."""

KEYS: Final = 128
"""Keys that are counted by name for each ten seconds: each is counted too low by less than a 128th of all."""

_SLICE: Final = 10
_SIZES: Final = 14
_MOST_HANGING: Final = 20
_MOST_KEYS: Final = 10
_MOST_FAILED: Final = 20
_MOST_STRANGE: Final = 1024
_LONGEST: Final = 300
"""Characters of a key, a name or an error."""

_PARTS: Final = ("queue wait", "load", "operations", "save", "other")

_PLAIN: Final = frozenset({str, bytes, int, float, bool, type(None), uuid.UUID, decimal.Decimal, dt.date, dt.datetime})
"""Of these, ``__hash__`` and ``__eq__`` cannot switch."""


def _is_plain(key: Any) -> bool:
    kind = type(key)
    return kind in _PLAIN or (kind is tuple and all(map(_is_plain, key)))


# -- what is kept ---------------------------------------------------------------------------------------------


class _Second:
    """The batches that ended within one second."""

    __slots__ = ("at", "batches", "conflicts", "failed", "operations", "parts", "raised", "sizes")

    def __init__(self, at: int) -> None:
        self.at = at
        # -- mutable state ---------------------------------------------------------------------------------
        self.batches = self.operations = self.raised = self.conflicts = self.failed = 0
        self.sizes = [0] * _SIZES  # batches by the bits of their number of operations
        self.parts = [0.0] * len(_PARTS)  # seconds


class _Keys:
    """The operations of the hottest keys within ten seconds, by Misra and Gries."""

    __slots__ = ("at", "counts", "total")

    def __init__(self, at: int) -> None:
        self.at = at
        # -- mutable state ---------------------------------------------------------------------------------
        self.total = 0  # of all keys
        self.counts: dict[Hashable, int] = {}

    def add(self, key: Hashable, operations: int) -> None:
        """Count; what all keys beyond `KEYS` have is taken from each, now and then."""
        counts = self.counts
        counts[key] = counts.get(key, 0) + operations
        if len(counts) >= 2 * KEYS:
            ranked = sorted(counts.items(), key=itemgetter(1), reverse=True)
            least = ranked[KEYS][1]
            self.counts = {key: count - least for key, count in ranked[:KEYS] if count > least}


class _Failed(NamedTuple):
    """A batch that failed as a whole."""

    at: float
    key: Hashable
    operation: str | None
    operations: int
    phase: str | None
    kind: str
    told: str
    retry_safe: bool


class _Seen:
    """What a page has seen of one processor: its watcher.

    It takes no lock: threads share it with ``batching=False``, and may lose a count, and nothing else. No code of
    the user's runs in `publish`.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._epoch = _process.here.epoch
        # -- mutable state ---------------------------------------------------------------------------------
        self._began = clock.monotonic()
        self._seconds = [_Second(-SPAN - 1)] * (SPAN + 1)
        self._keys: deque[_Keys] = deque([_Keys(-SPAN)], maxlen=SPAN // _SLICE)
        self._strange: deque[tuple[int, Hashable, int]] = deque(maxlen=_MOST_STRANGE)  # keys of the user's own classes
        self._failed: deque[_Failed] = deque(maxlen=_MOST_FAILED)

    def publish(self, metric: BatchMetric) -> None:
        """Count *metric*. Switches: no."""
        if self._epoch != _process.here.epoch:
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
        second.sizes[min(operations.bit_length(), _SIZES - 1)] += 1
        load, apply, save = metric.load_duration, metric.apply_duration, metric.save_duration
        parts = second.parts
        parts[0] += metric.queue_wait
        parts[1] += load
        parts[2] += apply
        parts[3] += save
        parts[4] += max(0.0, metric.total_duration - load - apply - save)
        self._count_key(now, metric.key, operations)
        if metric.error is not None:
            second.failed += 1
            self._keep_failed(metric)

    def close(self) -> None:
        """Keep what there is: it goes out of date by itself. Switches: no."""

    def _count_key(self, now: int, key: Hashable, operations: int) -> None:
        keys = self._keys[-1]
        if keys.at + _SLICE <= now:
            keys = _Keys(now - now % _SLICE)
            self._keys.append(keys)
        if not operations:
            return
        keys.total += operations
        if type(key) is str or _is_plain(key):
            keys.add(key, operations)
        else:
            self._strange.append((now, key, operations))

    def _keep_failed(self, metric: BatchMetric) -> None:
        error: Any = metric.error
        self._failed.append(
            _Failed(
                metric.started_at + metric.total_duration,
                metric.key,
                metric.operation_name,
                metric.operation_count,
                metric.phase,
                type(error).__name__,
                str(error)[: _LONGEST + 1],
                error.retry_safe,
            )
        )

    def now(self) -> _Minute:
        """Sum up the last minute. Switches: no."""
        if self._epoch != _process.here.epoch:
            self._restart()
        now = int(clock.monotonic())
        seconds = [second for second in self._seconds if 0 <= now - second.at <= SPAN]
        span = min(RATE_SPAN, max(1, now - int(self._began)))
        recent = [second for second in seconds if 0 < now - second.at <= span]
        slices = [keys for keys in tuple(self._keys) if now - keys.at <= SPAN]
        line = dict.fromkeys(range(now - SPAN, now), 0)
        line.update((second.at, second.operations) for second in seconds if second.at < now)
        return _Minute(
            watched=clock.monotonic() - self._began,
            operations_rate=sum(second.operations for second in recent) / span,
            batches_rate=sum(second.batches for second in recent) / span,
            line=list(line.values()),
            operations=sum(second.operations for second in seconds),
            batches=sum(second.batches for second in seconds),
            raised=sum(second.raised for second in seconds),
            conflicts=sum(second.conflicts for second in seconds),
            failed=sum(second.failed for second in seconds),
            sizes=[sum(column) for column in zip(*(second.sizes for second in seconds), strict=True)] or [0] * _SIZES,
            parts=[sum(column) for column in zip(*(second.parts for second in seconds), strict=True)]
            or [0.0] * len(_PARTS),
            counted=[tuple(keys.counts.items()) for keys in slices],
            counted_in_all=sum(keys.total for keys in slices),
            strange=[(key, count) for at, key, count in tuple(self._strange) if now - at <= SPAN],
            failures=list(self._failed)[::-1],
        )


class _Minute(NamedTuple):
    """What there is to be shown; a rate is of `RATE_SPAN`, all else of `SPAN`."""

    watched: float
    operations_rate: float
    batches_rate: float
    line: list[int]  # operations by second, the last one last
    operations: int
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
        """Rank the keys. Switches: only where ``__hash__`` or ``__eq__`` of a key do."""
        sums: dict[Hashable, int] = {}
        for counts in (*self.counted, self.strange):
            for key, count in counts:
                try:
                    sums[key] = sums.get(key, 0) + count
                except Exception:  # noqa: S112 - of a key of the user's, which has no place then
                    continue
        return sorted(sums.items(), key=itemgetter(1), reverse=True)[:_MOST_KEYS]


class _Live(NamedTuple):
    """What runs or waits at this moment."""

    queued: int
    running: int
    oldest: float | None  # how long the one has waited that was queued first
    hanging: int
    shown: list[tuple[int, LiveBatch]]


class _Gathered(NamedTuple):
    """All that is shown of one processor."""

    name: str
    state: str
    stats: ProcessorStats
    minute: _Minute
    live: _Live


def _live(processor: Processor[Any]) -> _Live:
    """Look at the live batches once, and closely at a few of those that hang. Switches: no."""
    state = _seam.state_of(processor)
    now = clock.monotonic()
    queued, oldest = 0, now
    running = []
    for batch in state.batches():
        if batch.phase != "queued":
            running.append(batch)
        else:
            queued += 1
            if batch.opened < oldest:  # noqa: PLR1730 - min() costs more than all the rest
                oldest = batch.opened
    hanging = [batch for batch in running if (batch.ended and batch.spent) or now - batch.started >= LONG]
    return _Live(
        queued=queued,
        running=len(running),
        oldest=now - oldest if queued else None,
        hanging=len(hanging),
        shown=[(id(batch), live_batch(batch)) for batch in nsmallest(_MOST_HANGING, hanging, key=_started)],
    )


def _started(batch: Batch) -> float:
    return batch.started


# -- the page -------------------------------------------------------------------------------------------------


class Page:
    """A WSGI application that shows what processors do. It begins to count when it is made.

    Args:
        allow: ``allow(environ)`` says who may see it. Whatever it gives but True is a 403 without content.
        processors: Those that it shows; by default all of the process, those that are made later too.

    Raises:
        TypeError: *allow* cannot be called, or one of *processors* is no `Processor`.
    Switches: no.
    """

    def __init__(
        self, *, allow: Callable[[WSGIEnvironment], bool], processors: Iterable[Processor[Any]] | None = None
    ) -> None:
        """See the class."""
        if not callable(allow):
            raise TypeError(f"allow is {allow!r}, but must be a callable that is given the WSGI environ")
        self._allow = allow
        # -- mutable state ---------------------------------------------------------------------------------
        self._seen: WeakKeyDictionary[Processor[Any], _Seen] = WeakKeyDictionary()
        for processor in _process.processors() if processors is None else processors:
            if not isinstance(processor, Processor):
                raise TypeError(f"processors has {processor!r}, but must have instances of Processor only")
            self._watch(processor)
        if processors is None:
            self._watch_later_ones()

    def __repr__(self) -> str:
        """Say how many processors it shows."""
        return f"<Page of {len(self._seen)} processors>"

    def _watch_later_ones(self) -> None:
        method = WeakMethod(self._watch)

        def watch(processor: Processor[Any]) -> None:
            if (living := method()) is not None:
                living(processor)

        _process.watchers.append(watch)
        finalize(self, _process.watchers.remove, watch).atexit = False

    def _watch(self, processor: Processor[Any]) -> None:
        seen = self._seen[processor] = _Seen()
        _seam.watch(processor, seen)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Be the WSGI application. Switches: no; *allow* may, and what a key's class does to show it."""
        status, headers, body = self.answer(environ)
        start_response(status, headers)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def answer(self, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]], bytes]:
        """Give status, headers and body: for a view of a framework that mounts no WSGI application.

        Raises:
            Exception: What *allow* raised.
        Switches: as *allow* does.
        """
        if self._allow(environ) is not True:
            return _empty("403 Forbidden")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _empty("405 Method Not Allowed", ("Allow", "GET, HEAD"))
        body = self._html().encode("utf-8", "backslashreplace")
        return "200 OK", [("Content-Type", "text/html; charset=utf-8"), *_HEADERS, _length(body)], body

    def _html(self) -> str:
        # All is gathered before anything is shown: what shows a key may be of the user's, and switch.
        gathered = sorted(
            (
                _Gathered(processor.name, _state_of(processor), processor.stats(), seen.now(), _live(processor))
                for processor, seen in list(self._seen.items())
            ),
            key=itemgetter(0),
        )
        names = [one.name for one in gathered]
        sections = ["".join(_section(one._replace(name=_numbered(names, place)))) for place, one in enumerate(gathered)]
        problems = [f'<p class="bad" role="alert">{_text(str(problem))}</p>' for problem in check()]
        watched = max((one.minute.watched for one in gathered), default=0.0)
        head = (
            f"<header><h1>Batches</h1><p>Process <b>{os.getpid()}</b> at {_at(clock.wall())} UTC, watched for "
            f"{_seconds(watched)}. Each process has numbers of its own: where there are several, the next answer may "
            "be another one's.</p></header>"
        )
        nothing = "" if sections else "<p>There is no processor in this process.</p>"
        return "".join((_BEFORE, head, *problems, *sections, nothing, _AFTER))


def _empty(status: str, *headers: tuple[str, str]) -> tuple[str, list[tuple[str, str]], bytes]:
    # A content type, since WSGI wants one wherever there might be content.
    return status, [("Content-Type", "text/plain"), ("Cache-Control", "no-store"), *headers, _length(b"")], b""


def _length(body: bytes) -> tuple[str, str]:
    return "Content-Length", str(len(body))


def _numbered(names: list[str], place: int) -> str:
    """Tell processors of one name apart."""
    name = names[place]
    return name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"


def _state_of(processor: Processor[Any]) -> str:
    state = _seam.state_of(processor)
    if state.stopping:
        return "stopped" if state.ended else "stopping"
    return "running" if processor.batching else "batching off"


# -- how it is shown ------------------------------------------------------------------------------------------


def _section(one: _Gathered) -> Iterator[str]:
    yield f"<section><h2>{_text(one.name)} <small>{one.state}</small></h2>"
    yield from _tiles(one.stats, one.minute, one.live)
    yield from _hanging(one.live)
    yield '<div class="columns">'
    yield from _hottest(one.minute)
    yield from _sizes(one.minute)
    yield from _parts(one.minute)
    yield "</div>"
    yield from _failures(one.minute)
    yield _totals(one.stats)
    yield "</section>"


def _tiles(stats: ProcessorStats, minute: _Minute, live: _Live) -> Iterator[str]:
    size = minute.operations / minute.batches if minute.batches else 0.0
    most = max(minute.line)
    yield "<dl>"
    yield _tile("Operations", _number(minute.operations_rate), "/s", "operations-rate")
    yield _tile("Batches", _number(minute.batches_rate), "/s", "batches-rate")
    yield _tile("Operations per batch", _number(size))
    yield _tile("Callers waiting", f"{stats.operations:,}")
    yield _tile("Batches running", f"{live.running:,}")
    oldest = "" if live.oldest is None else f" up to {_seconds(live.oldest)}"
    yield _tile("Batches queued", f"{live.queued:,}", oldest)
    yield "</dl>"
    yield (
        f'<figure><svg viewBox="0 0 {SPAN} 20" preserveAspectRatio="none" role="img" '
        f'aria-label="Operations in each of the last {SPAN} seconds">'
    )
    for place, count in enumerate(minute.line):
        if count:
            height = 20 * count / most
            yield f'<rect x="{place}" y="{20 - height:.2f}" width=".85" height="{height:.2f}"/>'
    yield (
        f"</svg><figcaption>Operations in each of the last {SPAN} seconds, {most:,} at the most. "
        f"Of {minute.operations:,} operations {minute.raised:,} raised; of {minute.batches:,} batches "
        f"{minute.failed:,} failed; {minute.conflicts:,} conflicts.</figcaption></figure>"
    )


def _tile(what: str, value: str, unit: str = "", name: str = "") -> str:
    named = f' class="{name}"' if name else ""
    return f"<div><dt>{what}</dt><dd{named}>{value}<small>{unit}</small></dd></div>"


def _hanging(live: _Live) -> Iterator[str]:
    if not live.hanging:
        yield f'<p class="good">Nothing has been running for {LONG:g} s or longer.</p>'
        return
    left = live.hanging - len(live.shown)
    more = f", the first {len(live.shown)} of {live.hanging:,}" if left else ""
    yield f'<h3 class="bad">What hangs{more}</h3><div class="wide"><table class="hanging"><thead><tr>'
    yield "<th>Key<th>Doing<th class=n>Since<th class=n>Deadline<th class=n>Attempt<th class=n>Callers waiting"
    yield "<th>Where its code waits</tr></thead><tbody>"
    for identity, batch in live.shown:
        deadline = "passed" if batch.remaining is None else f"in {_seconds(batch.remaining)}"
        yield (
            f"<tr><td class=k>{_key(batch.key)}<td>{'overdue: ' if batch.overdue else ''}{batch.phase}"
            f"<td class=n>{_seconds(batch.running or 0.0)}<td class=n>{deadline}<td class=n>{batch.attempts}"
            f"<td class=n>{batch.waiting:,}<td>{_stack(identity, batch.stack)}</tr>"
        )
    yield "</tbody></table></div>"


def _stack(identity: int, stack: tuple[str, ...]) -> str:
    if not stack:
        return "not to be seen"
    place = next((frame for frame in reversed(stack) if "/gevent/" not in frame), stack[-1])
    frames = "\n".join(_text(frame) for frame in stack)
    short = "/".join(place.split("/")[-2:])
    return f'<details id="b{identity}"><summary>{_text(short)}</summary><pre>{frames}</pre></details>'


def _hottest(minute: _Minute) -> Iterator[str]:
    yield '<div><h3>Hottest keys <small>in the last minute</small></h3><table class="keys"><thead><tr><th>Key'
    yield "<th class=n>Operations<th class=n>Share<th></tr></thead><tbody>"
    for key, count in minute.hottest():
        share = min(1.0, count / max(1, minute.counted_in_all))
        yield f"<tr><td>{_key(key)}<td class=n>{count:,}<td class=n>{_percent(share)}<td>{_bar(share)}</tr>"
    yield "</tbody></table></div>"


def _sizes(minute: _Minute) -> Iterator[str]:
    yield "<div><h3>Operations in a batch <small>likewise</small></h3><table><thead><tr><th class=n>Operations"
    yield "<th class=n>Batches<th class=n>Share<th></tr></thead><tbody>"
    for bits, count in enumerate(minute.sizes):
        if count:
            share = count / minute.batches
            yield f"<tr><td class=n>{_size(bits)}<td class=n>{count:,}<td class=n>{_percent(share)}"
            yield f"<td>{_bar(share)}</tr>"
    yield "</tbody></table></div>"


def _size(bits: int) -> str:
    least = 1 << bits >> 1
    if bits == _SIZES - 1:
        return f"{least:,} or more"
    return str(least) if bits <= 1 else f"{least:,} to {2 * least - 1:,}"


def _parts(minute: _Minute) -> Iterator[str]:
    yield "<div><h3>Where the time goes <small>likewise</small></h3><table><thead><tr><th>Part"
    yield "<th class=n>Mean per batch<th class=n>Share<th></tr></thead><tbody>"
    whole = sum(minute.parts)
    for name, seconds in zip(_PARTS, minute.parts, strict=True):
        share = seconds / whole if whole else 0.0
        mean = _seconds(seconds / max(1, minute.batches))
        yield f"<tr><td>{name}<td class=n>{mean}<td class=n>{_percent(share)}<td>{_bar(share)}</tr>"
    yield "</tbody></table></div>"


def _failures(minute: _Minute) -> Iterator[str]:
    if not minute.failures:
        yield '<p class="good">No batch has failed.</p>'
        return
    now = clock.wall()
    yield '<h3>The last failed batches</h3><div class="wide"><table class="failed"><thead><tr><th>At (UTC)'
    yield "<th class=n>Ago<th>Key<th>Operation<th class=n>Operations<th>Error</tr></thead><tbody>"
    for one in minute.failures:
        name = "" if one.operation is None else _text(one.operation)
        unknown = "" if one.retry_safe else " <b class=bad>outcome unknown</b>"
        phase = "" if one.phase is None else f" in {one.phase}"
        yield (
            f"<tr><td>{_at(one.at)}<td class=n>{_seconds(max(0.0, now - one.at))}<td class=k>{_key(one.key)}<td>{name}"
            f"<td class=n>{one.operations:,}<td><b>{_text(one.kind)}</b>{phase}{unknown}<br>{_text(one.told)}</tr>"
        )
    yield "</tbody></table></div>"


def _totals(stats: ProcessorStats) -> str:
    return (
        f"<p class=quiet>In all: {stats.operations_total:,} operations answered, {stats.batches_total:,} batches, "
        f"{stats.failed_batches_total:,} failed, {stats.conflicts_total:,} conflicts, {stats.withdrawn_total:,} "
        f"operations withdrawn, {stats.overloaded_total:,} refused. {stats.workers:,} workers, {stats.keys:,} keys.</p>"
    )


def _key(key: object) -> str:
    return f"<code>{_text(shown(key))}</code>"


def _text(text: str) -> str:
    """Escape what is not ours, and bound it."""
    return escape(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")


def _bar(share: float) -> str:
    return (
        '<svg class=bar viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * share:.1f}" height="1"/></svg>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"  # noqa: PLR2004 - three digits


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(seconds: float) -> str:
    if seconds >= 3600:  # noqa: PLR2004 - an hour
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    if seconds >= 60:  # noqa: PLR2004 - a minute
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _at(wall: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(wall))


_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2733; --quiet: #56616d; --line: #d5dbe1; --paper: #fff; --tile: #f3f6f9;
  --bar: #2f74c0; --bad: #a3290b; --good: #1e6b35; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --quiet: #9fabb8; --line: #36414d; --paper: #14191f;
  --tile: #1e252d; --bar: #5d9fe6; --bad: #ff8d6e; --good: #7bcf93; } }
body { font: .9rem/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 80rem;
  margin: 1.25rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; } header p { margin: .2rem 0 0; }
small, header p, figcaption, .quiet, dt, th { color: var(--quiet); font-weight: normal; }
header b { color: var(--ink); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem; margin: 0 0 .75rem; }
dl div { background: var(--tile); border-radius: .35rem; padding: .4rem .7rem; }
dt, th, figcaption, .quiet { font-size: .8rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
dd small { font-size: .8rem; margin-left: .2rem; }
figure { margin: 0; } figure svg { width: 100%; height: 3.5rem; border-bottom: 1px solid var(--line); display: block; }
svg { fill: var(--bar); } .bar { width: 100%; min-width: 3rem; height: .6rem; background: var(--tile); display: block; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 0 1.75rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child, th:last-child { padding-right: 0; } .columns td { vertical-align: middle; }
.columns td:last-child { width: 25%; }
.wide td:last-child { width: 55%; }
.k { min-width: 8rem; } td:first-child { min-width: 5rem; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code, pre, summary { font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre { margin: .2rem 0; white-space: pre-wrap; } summary { cursor: pointer; }
.bad { color: var(--bad); } .good { color: var(--good); margin: .75rem 0 0; }
button { font: inherit; position: absolute; top: 1rem; right: 1rem; }
#stale { color: var(--bad); } .stale main { opacity: .5; }
"""

_SCRIPT: Final = """
"use strict";
const button = document.createElement("button");
const stale = document.createElement("p");
let paused = false;
stale.id = "stale";
stale.setAttribute("role", "status");
button.textContent = "Pause";
button.addEventListener("click", () => {
  paused = !paused;
  button.textContent = paused ? "Go on" : "Pause";
});
document.body.prepend(button, stale);

async function look() {
  const answer = await fetch(location.href, {cache: "no-store", redirect: "error", signal: AbortSignal.timeout(5000)});
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
  if (!fresh) throw new Error("the server answered with another page");
  for (const open of document.querySelectorAll("main details[open]")) {
    const same = fresh.querySelector(`#${open.id}`);
    if (same) same.open = true;
  }
  document.querySelector("main").replaceWith(fresh);
}

async function watch() {
  // What is being selected, to be copied, stays.
  if (!paused && !document.hidden && getSelection().isCollapsed) {
    try {
      await look();
      document.body.classList.remove("stale");
      stale.textContent = "";
    } catch (error) {
      document.body.classList.add("stale");
      stale.textContent = `These numbers are old: ${error.message}.`;
    }
  }
  setTimeout(watch, 1000);
}

setTimeout(watch, 1000);
"""


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


_POLICY: Final = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_HEADERS: Final = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)

_BEFORE: Final = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<meta name="robots" content="noindex"><title>Batches</title>'
    '<noscript><meta http-equiv="refresh" content="5"></noscript>'
    f"<style>{_STYLE}</style></head><body><main>"
)

_AFTER: Final = f"</main><script>{_SCRIPT}</script></body></html>"
