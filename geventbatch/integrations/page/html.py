"""The HTML of a processor on the page."""

from __future__ import annotations

import os
import time
from html import escape
from typing import TYPE_CHECKING, Final, NamedTuple

from geventbatch._core.clock import clock
from geventbatch._safe_repr import shown
from geventbatch.integrations.page.assets import AFTER, BEFORE
from geventbatch.integrations.page.history import LONG, LONGEST, MOST_WAITING, NEARLY_ALL, PARTS, SIZES, SPAN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from geventbatch._watch.problem import SetupProblem
    from geventbatch._watch.stats import ProcessorStats
    from geventbatch.integrations.page.history import Live, Minute


_FEW: Final = 5
"""Keys of a batch that are shown; of more, their number."""


class Gathered(NamedTuple):
    """All values shown of one processor."""

    name: str
    state: str
    stats: ProcessorStats
    minute: Minute
    live: Live


def document(gathered: list[Gathered], problems: Iterable[SetupProblem]) -> str:
    """Return the page."""
    names = [one.name for one in gathered]
    sections = ["".join(_section(one._replace(name=_numbered(names, place)))) for place, one in enumerate(gathered)]
    told = [f'<p class="bad" role="alert">{_text(str(problem))}</p>' for problem in problems]
    watched = max((one.minute.watched for one in gathered), default=0.0)
    head = (
        f"<header><h1>Batches</h1><p>Process <b>{os.getpid()}</b> at {_at(clock.wall())} UTC, watched for "
        f"{_seconds(watched)}. Each process has numbers of its own: where there are several, the next answer may "
        "be another one's.</p></header>"
    )
    nothing = "" if sections else "<p>There is no processor in this process.</p>"
    return "".join((BEFORE, head, *told, *sections, nothing, AFTER))


def _numbered(names: list[str], place: int) -> str:
    """Return a name that tells processors of one name apart."""
    name = names[place]
    return name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"


def _section(one: Gathered) -> Iterator[str]:
    yield f"<section><h2>{_text(one.name)} <small>{one.state}</small></h2>"
    yield from _tiles(one.stats, one.minute, one.live)
    yield from _hanging(one.live)
    yield from _blocked(one.live)
    yield from _crowded(one.minute)
    yield '<div class="columns">'
    yield from _hottest(one.minute)
    yield from _sizes(one.minute)
    yield from _parts(one.minute)
    yield "</div>"
    yield from _failures(one.minute)
    yield _totals(one.stats)
    yield "</section>"


def _tiles(stats: ProcessorStats, minute: Minute, live: Live) -> Iterator[str]:
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


def _hanging(live: Live) -> Iterator[str]:
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
            f"<tr><td class=k>{_keys(batch.keys)}<td>{'overdue: ' if batch.overdue else ''}{batch.phase}"
            f"<td class=n>{_seconds(batch.running or 0.0)}<td class=n>{deadline}<td class=n>{batch.attempts}"
            f"<td class=n>{batch.waiting:,}<td>{_stack(identity, batch.stack)}</tr>"
        )
    yield "</tbody></table></div>"


def _blocked(live: Live) -> Iterator[str]:
    """Show which operations across keys wait for which others."""
    if not live.blocked:
        return
    first = f", the first {len(live.waiting)} of {live.blocked:,}" if live.blocked > len(live.waiting) else ""
    yield f'<h3>Who waits for whom{first}</h3><div class="wide"><table class="blocked"><thead><tr>'
    yield "<th>An operation across<th class=n>Since<th>Waits at<th>Behind a batch of</tr></thead><tbody>"
    for batch in live.waiting:
        for place, (key, keys) in enumerate(zip(batch.waits_at, batch.waits_for, strict=True)):
            own = f"<td class=k>{_keys(batch.keys)}<td class=n>{_seconds(batch.age)}" if not place else "<td><td>"
            yield f"<tr>{own}<td class=k>{_key(key)}<td class=k>{_keys(keys)}</tr>"
    yield "</tbody></table></div>"
    if live.blocked >= MOST_WAITING and live.crowd >= NEARLY_ALL * live.blocked:
        yield (
            f"<p>{_percent(live.crowd / live.blocked)} of the {live.blocked:,} that wait for others wait at the key "
            f"{_key(live.crowded)}.</p>"
        )


def _crowded(minute: Minute) -> Iterator[str]:
    """Say so if one key is in nearly all operations, most of which are across keys."""
    hottest = minute.hottest()
    if not hottest or minute.across * 2 < minute.operations:
        return
    key, count = hottest[0]
    share = min(1.0, count / max(1, minute.counted_in_all))
    if share >= NEARLY_ALL and minute.operations >= MOST_WAITING:
        yield (
            f'<p class="crowded">The key {_key(key)} was in {_percent(share)} of the operations of the last minute. '
            "Across keys, all that it connects is saved together: a conflict of one key replays all of them, and what "
            "comes meanwhile waits.</p>"
        )


def _stack(identity: int, stack: tuple[str, ...]) -> str:
    if not stack:
        return "not to be seen"
    place = next((frame for frame in reversed(stack) if "/gevent/" not in frame), stack[-1])
    frames = "\n".join(_text(frame) for frame in stack)
    short = "/".join(place.split("/")[-2:])
    return f'<details id="b{identity}"><summary>{_text(short)}</summary><pre>{frames}</pre></details>'


def _hottest(minute: Minute) -> Iterator[str]:
    yield '<div><h3>Hottest keys <small>in the last minute</small></h3><table class="keys"><thead><tr><th>Key'
    yield "<th class=n>Operations<th class=n>Share<th></tr></thead><tbody>"
    for key, count in minute.hottest():
        share = min(1.0, count / max(1, minute.counted_in_all))
        yield f"<tr><td>{_key(key)}<td class=n>{count:,}<td class=n>{_percent(share)}<td>{_bar(share)}</tr>"
    yield "</tbody></table></div>"


def _sizes(minute: Minute) -> Iterator[str]:
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
    if bits == SIZES - 1:
        return f"{least:,} or more"
    return str(least) if bits <= 1 else f"{least:,} to {2 * least - 1:,}"


def _parts(minute: Minute) -> Iterator[str]:
    yield "<div><h3>Where the time goes <small>likewise</small></h3><table><thead><tr><th>Part"
    yield "<th class=n>Mean per batch<th class=n>Share<th></tr></thead><tbody>"
    whole = sum(minute.parts)
    for name, seconds in zip(PARTS, minute.parts, strict=True):
        share = seconds / whole if whole else 0.0
        mean = _seconds(seconds / max(1, minute.batches))
        yield f"<tr><td>{name}<td class=n>{mean}<td class=n>{_percent(share)}<td>{_bar(share)}</tr>"
    yield "</tbody></table></div>"


def _failures(minute: Minute) -> Iterator[str]:
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
            f"<tr><td>{_at(one.at)}<td class=n>{_seconds(max(0.0, now - one.at))}<td class=k>{_keys(one.keys)}"
            f"<td>{name}<td class=n>{one.operations:,}"
            f"<td><b>{_text(one.kind)}</b>{phase}{unknown}<br>{_text(one.told)}</tr>"
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


def _keys(keys: tuple[object, ...]) -> str:
    """Return the first of *keys*, and how many more there are."""
    more = f" and {len(keys) - _FEW:,} more" if len(keys) > _FEW else ""
    return ", ".join(map(_key, keys[:_FEW])) + more


def _text(text: str) -> str:
    """Escape a text from elsewhere, and bound its length."""
    return escape(text if len(text) <= LONGEST else text[:LONGEST] + "…")


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
