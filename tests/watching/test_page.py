"""The page for one's own admin: who may see it, what it shows, and that it never hurts a batch."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import gevent
import pytest
import sqlalchemy as sa
from greenlet import settrace

from examples.tickets.compare import load
from geventbatch import Processor
from geventbatch._core import process
from geventbatch.integrations.page import Page, history
from tests.support.browser import browser, keep
from tests.support.callers import answer_of, in_a_thread
from tests.support.servers import ask, database, store, tickets, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from wsgiref.types import WSGIEnvironment

    from geventbatch import BatchMetric
    from geventbatch.testing import VirtualTime

pytestmark = pytest.mark.usefixtures("no_other_processors")

ROOT = Path(__file__).parents[2]


def anybody(environ: WSGIEnvironment) -> bool:
    return True


def nothing(resource: object) -> None:
    """An operation."""


@dataclass
class Answer:
    status: str
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """What a person reads, in one line."""
        main = re.search(r"<main>(.*)</main>", self.body.decode(), re.DOTALL)
        assert main is not None
        return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", main[1])))


def get(page: Page, method: str = "GET", **environ: Any) -> Answer:
    """Call it as a server does, and as the WSGI standard has it."""
    setup_testing_defaults(environ)
    environ.update(REQUEST_METHOD=method, QUERY_STRING="")
    begun: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: object = None, /) -> Any:
        begun.append((status, dict(headers)))
        return BytesIO().write

    body = validator(page)(environ, start_response)
    try:
        content = b"".join(body)
    finally:
        body.close()  # type: ignore[attr-defined]
    ((status, headers),) = begun
    return Answer(status, headers, content)


def text(page: Page) -> str:
    return get(page).text


def rows(page: Page, table: str) -> list[str]:
    found = re.search(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', get(page).body.decode(), re.DOTALL)
    assert found is not None
    return [" ".join(unescape(re.sub(r"<[^>]*>", " ", row)).split()) for row in found[1].split("</tr>")[:-1]]


@pytest.fixture
def processor(clock: VirtualTime) -> Iterator[Processor[None]]:
    with Processor(min_duration=0, max_duration=5, name="seats") as processor:
        yield processor


# -- who may see it -------------------------------------------------------------------------------------------


def test_there_is_no_page_without_a_rule_of_who_may_see_it() -> None:
    with pytest.raises(TypeError, match="allow"):
        Page()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="allow is None, but must be a callable"):
        Page(allow=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [False, None, 0, 1, "yes", object()], ids=repr)
def test_whatever_the_rule_gives_but_true_is_a_refusal_without_content(given: Any) -> None:
    asked: list[Any] = []

    def allow(environ: WSGIEnvironment) -> bool:
        asked.append(environ["REMOTE_ADDR"])
        return given  # type: ignore[no-any-return]

    for method in ("GET", "HEAD", "POST"):
        answer = get(Page(allow=allow, processors=[]), method, REMOTE_ADDR="10.0.0.1")
        assert (answer.status, answer.body) == ("403 Forbidden", b"")
        assert answer.headers["Cache-Control"] == "no-store"
    assert asked == ["10.0.0.1"] * 3


def test_what_the_rule_raises_goes_up_and_shows_nothing() -> None:
    def allow(environ: WSGIEnvironment) -> bool:
        raise LookupError

    with pytest.raises(LookupError):
        Page(allow=allow, processors=[])({}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_is_only_read(method: str) -> None:
    answer = get(Page(allow=anybody, processors=[]), method)
    assert (answer.status, answer.headers["Allow"], answer.body) == ("405 Method Not Allowed", "GET, HEAD", b"")


def test_head_has_the_headers_of_the_page_and_no_content(processor: Processor[None]) -> None:
    page = Page(allow=anybody, processors=[processor])
    whole, head = get(page), get(page, "HEAD")
    assert (head.status, head.headers, head.body) == ("200 OK", whole.headers, b"")
    assert int(whole.headers["Content-Length"]) == len(whole.body)


def test_browsers_are_told_to_keep_nothing_to_frame_nothing_and_to_run_only_what_is_its_own() -> None:
    answer = get(Page(allow=anybody, processors=[]))
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Frame-Options"] == "DENY"
    policy = answer.headers["Content-Security-Policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
        assert f"{directive} 'sha256-{b64encode(sha256(own.encode()).digest()).decode()}';" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert b"unsafe" not in policy.encode()
    assert not re.search(rb"\s(src|href|style|on\w+)=", answer.body)


# -- what it shows --------------------------------------------------------------------------------------------


def test_rates_sizes_and_hottest_keys_are_of_what_has_ended_of_late(
    clock: VirtualTime, processor: Processor[None]
) -> None:
    page = Page(allow=anybody, processors=[processor])
    clock.advance(20)
    for _ in range(10):
        callers = [gevent.spawn(processor.run, key, nothing) for key in ("hot",) * 6 + ("cold",)]
        gevent.joinall(callers)
        clock.advance(1)
    shown = text(page)
    assert "seats running" in shown
    assert "Operations 7 /s Batches 2 /s Operations per batch 3.5 Callers waiting 0" in shown
    assert "Of 70 operations 0 raised; of 20 batches 0 failed" in shown
    assert [row.split() for row in rows(page, "keys")] == [["'hot'", "60", "85.7", "%"], ["'cold'", "10", "14.3", "%"]]
    assert "Operations Batches Share 1 10 50.0 % 4 to 7 10 50.0 %" in shown
    assert "In all: 70 operations answered, 20 batches" in shown
    clock.advance(5)
    assert "Operations 3.5 /s Batches 1 /s" in text(page)
    clock.advance(66)
    shown = text(page)
    assert "Operations 0 /s Batches 0 /s" in shown
    assert "Of 0 operations" in shown
    assert rows(page, "keys") == []
    assert "In all: 70 operations answered, 20 batches" in shown


def test_it_says_where_the_time_goes(clock: VirtualTime) -> None:
    def sleep(seconds: float) -> Any:
        return lambda *_: gevent.sleep(seconds)

    with Processor(load_resource=sleep(0.3), save_resource=sleep(0.1), min_duration=0, max_duration=5) as processor:
        page = Page(allow=anybody, processors=[processor])
        processor.run("k", sleep(0.6))
        assert "load 300.0 ms 30.0 % operations 600.0 ms 60.0 % save 100.0 ms 10.0 % other 0.0 ms 0.0 %" in text(page)


def test_what_hangs_is_shown_with_its_stack_and_what_does_not_hang_is_not(clock: VirtualTime) -> None:
    def stuck(key: str) -> None:
        gevent.sleep(4 if key == "slow" else 0.5)

    processor: Processor[None] = Processor(load_resource=stuck, min_duration=0, max_duration=5, max_batches=2)
    page = Page(allow=anybody, processors=[processor])
    callers = [gevent.spawn(processor.run, "slow", nothing) for _ in range(3)]
    clock.advance(0.9)
    assert "Nothing has been running for 1 s or longer" in text(page)
    clock.advance(1.6)
    callers += [gevent.spawn(processor.run, key, nothing) for key in ("quick", "behind")]
    clock.advance(0.25)
    (row,) = rows(page, "hanging")
    assert row.split()[:9] == ["'slow'", "load", "2.8", "s", "in", "2.2", "s", "1", "3"]
    line = stuck.__code__.co_firstlineno + 1
    assert f"{__file__}:{line} in test_what_hangs_is_shown_with_its_stack" in row
    assert "Callers waiting 5 Batches running 2 Batches queued 1 up to 250.0 ms" in text(page)
    gevent.joinall(callers)
    assert "Nothing has been running" in text(page)
    processor.stop()


def test_what_hangs_in_its_callers_own_greenlet_is_shown_too(clock: VirtualTime) -> None:
    with Processor(min_duration=0, max_duration=5, batching=False) as processor:
        page = Page(allow=anybody, processors=[processor])
        caller = gevent.spawn(processor.run, "alone", lambda _: gevent.sleep(3))
        clock.advance(2)
        (row,) = rows(page, "hanging")
        assert row.startswith("'alone' operations 2.0 s in 3.0 s 1 1 ")
        caller.get()


def test_a_batch_whose_callers_were_told_and_whose_code_hangs_on_is_overdue(clock: VirtualTime) -> None:
    def hang(key: str) -> None:
        try:
            gevent.sleep(100)
        finally:
            gevent.sleep(100)

    processor: Processor[None] = Processor(load_resource=hang, min_duration=0, max_duration=0.5)
    page = Page(allow=anybody, processors=[processor])
    answer_of(processor.run, "k", nothing)
    (row,) = rows(page, "hanging")
    assert row.split()[:6] == ["'k'", "overdue:", "load", "500.0", "ms", "passed"]
    clock.advance(100)
    processor.stop()


def test_the_last_failed_batches_say_when_what_and_whether_the_outcome_is_known(clock: VirtualTime) -> None:
    def save(key: int, resource: None) -> None:
        raise OSError(f"disk {key}")

    with Processor(save_resource=save, min_duration=0, max_duration=5) as processor:
        page = Page(allow=anybody, processors=[processor])
        assert "No batch has failed" in text(page)
        for key in range(25):
            answer_of(processor.run, key, nothing)
        clock.advance(7)
        failed = rows(page, "failed")
    assert len(failed) == 20
    assert re.match(r"\d\d:\d\d:\d\d 7.0 s 24 nothing 1 SaveFailed in save outcome unknown", failed[0])
    assert "saving raised OSError('disk 24')" in failed[0]
    assert "25 failed" in text(page)


def test_problems_of_the_process_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.here, "forked_late", True)
    assert "This process was forked from one that had run batches already" in text(Page(allow=anybody, processors=[]))


# -- text that is not its own ---------------------------------------------------------------------------------


class Odd:
    """A key that shows itself as it likes."""

    def __init__(self, shown: str | None) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        if self._shown is None:
            raise ZeroDivisionError
        return self._shown


EVIL = '<script>alert("1")</script>&\''


def test_keys_names_and_errors_are_only_ever_text(clock: VirtualTime) -> None:
    def hang(key: object) -> None:
        gevent.sleep(3)
        raise OSError(EVIL)

    def operation(resource: None) -> None:
        """Never applied."""

    operation.__qualname__ = EVIL
    processor: Processor[None] = Processor(
        load_resource=hang, min_duration=0, max_duration=5, name=EVIL, worker_number_for_key=lambda key, workers: 0
    )
    page = Page(allow=anybody, processors=[processor])
    keys = (EVIL, Odd(EVIL), Odd(None), Odd("\ud800"), Odd("x" * 10**6), ("a", EVIL))
    callers = [gevent.spawn(answer_of, processor.run, key, operation) for key in keys]
    clock.advance(2)
    hanging = get(page)
    gevent.joinall(callers)
    ended = get(page)
    for answer in (hanging, ended):
        assert answer.body.count(b"<script>") == 1  # its own
        assert answer.body.count(b"&lt;script&gt;") >= 4
        assert b'alert("1")' not in answer.body
        assert b"Odd object at 0x" in answer.body
        assert len(answer.body) < 100_000
    assert len(rows(page, "failed")) == len(keys)
    processor.stop()


def test_keys_of_the_users_own_classes_are_compared_when_they_are_shown_and_not_when_a_batch_ends(
    clock: VirtualTime,
) -> None:
    compared: list[object] = []

    class Key:
        def __init__(self, name: str) -> None:
            self.name = name

        def __hash__(self) -> int:
            compared.append(gevent.getcurrent())
            return hash(self.name)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Key) and self.name == other.name

        def __repr__(self) -> str:
            return f"Key {self.name}"

    with Processor(min_duration=0, max_duration=5, worker_number_for_key=lambda key, workers: 0) as processor:
        for _ in range(3):
            processor.run(Key("a"), nothing)
        before = len(compared)
        page = Page(allow=anybody, processors=[processor])
        for _ in range(3):
            processor.run(Key("a"), nothing)
        assert len(compared) == 2 * before  # no more often than without the page
        (row,) = rows(page, "keys")
        assert row.split() == ["Key", "a", "3", "100.0", "%"]


# -- which processors -----------------------------------------------------------------------------------------


def test_by_default_it_shows_all_processors_and_those_that_are_made_later(clock: VirtualTime) -> None:
    early: Processor[None] = Processor(min_duration=0, name="early")
    early.run("k", nothing)
    page = Page(allow=anybody)
    late: Processor[None] = Processor(min_duration=0, name="late")
    late.run("k", nothing)
    shown = text(page)
    assert re.search("early running .* Of 0 operations .* late running .* Of 1 operations", shown)
    early.stop()
    late.batching = False
    shown = text(page)
    assert "early stopped" in shown
    assert "late batching off" in shown
    late.stop()
    del late
    gc.collect()
    assert "late" not in text(page)


def test_processors_of_one_name_are_told_apart(clock: VirtualTime) -> None:
    ones: list[Processor[None]] = [Processor(min_duration=0, name="seats") for _ in range(2)]
    other: Processor[None] = Processor(min_duration=0, name="other")
    page = Page(allow=anybody, processors=[*ones, other])
    ones[1].run("k", nothing)
    assert re.search(
        r"other running .* seats \(1\) running .* Of 0 operations .* seats \(2\) running .* Of 1 operations", text(page)
    )
    for processor in (*ones, other):
        processor.stop()


def test_a_page_that_is_gone_watches_nobody(clock: VirtualTime) -> None:
    gc.collect()
    before = list(process.watchers)
    page = Page(allow=anybody)
    assert len(process.watchers) == len(before) + 1
    del page
    gc.collect()
    assert process.watchers == before
    with Processor(min_duration=0) as processor:
        processor.run("k", nothing)


def test_what_is_no_processor_is_refused() -> None:
    with pytest.raises(TypeError, match="processors has 5, but must have instances of Processor only"):
        Page(allow=anybody, processors=[5])  # type: ignore[list-item]


def test_where_there_is_no_processor_it_says_so() -> None:
    assert "There is no processor in this process" in text(Page(allow=anybody, processors=[]))


FORK = """
from gevent import monkey; monkey.patch_all()
import os, re
from geventbatch import Processor
from geventbatch.integrations.page import Page

processor = Processor(min_duration=0)
page = Page(allow=lambda environ: True)

def look():
    body = page.answer({"REQUEST_METHOD": "GET"})[2].decode()
    told = re.search("Process <b>(.*?)</b>", body)[1] == str(os.getpid())
    print(told, re.search(r"Of (\\d+) operations", body)[1], re.search("In all: .*? answered", body)[0], flush=True)

processor.run("k", id)
look()
if os.fork() == 0:
    import warnings; warnings.simplefilter("ignore")
    look()
    processor.run("k", id)
    processor.run("k", id)
    look()
    os._exit(0)
os.wait()
look()
"""


def test_in_a_child_of_a_fork_the_numbers_start_at_zero() -> None:
    ran = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True, check=True, timeout=50)
    assert ran.stdout.splitlines() == [f"True {count} In all: {count} operations answered" for count in (1, 0, 2, 1)], (
        ran.stderr
    )


# -- it hurts nobody ------------------------------------------------------------------------------------------


def test_nothing_switches_while_it_is_made_or_while_a_batch_is_counted(
    clock: VirtualTime, processor: Processor[None]
) -> None:
    page = Page(allow=anybody, processors=[processor])
    callers = [gevent.spawn(processor.run, key, lambda _: gevent.sleep(2)) for key in range(50)]
    clock.advance(1.5)
    switches: list[object] = []
    before = settrace(lambda event, args: switches.append(args))
    try:
        get(page)
    finally:
        settrace(before)
    assert switches == []
    assert len(rows(page, "hanging")) == 20
    assert "What hangs, the first 20 of 50" in text(page)
    gevent.joinall(callers)


def test_what_is_kept_and_what_is_shown_does_not_grow_with_keys(clock: VirtualTime) -> None:
    with Processor(min_duration=0, max_duration=5, batching=False) as processor:
        page = Page(allow=anybody, processors=[processor])
        seen = page._seen[processor]
        for number in range(3_000):
            processor.run(number, nothing)
            processor.run("hot", nothing)
            if number % 300 == 0:
                clock.advance(1)
        assert all(len(keys.counts) < 2 * history.KEYS for keys in seen._keys)
        hot, *others = rows(page, "keys")
        assert len(others) == 9
    name, count, *_ = hot.split()
    assert name == "'hot'"
    # As is promised: too low by less than a 128th of all.
    assert 3_000 - 6_000 / history.KEYS < int(count.replace(",", "")) <= 3_000


def test_with_batching_off_any_thread_is_counted_and_may_ask(clock: VirtualTime) -> None:
    with Processor(min_duration=0, batching=False) as processor:
        page = Page(allow=anybody, processors=[processor])
        in_a_thread(processor.run, "k", nothing)
        assert "Of 1 operations" in in_a_thread(text, page)


def test_another_thread_sees_the_counts_and_not_the_batches_that_may_change_meanwhile(
    clock: VirtualTime, processor: Processor[None]
) -> None:
    page = Page(allow=anybody, processors=[processor])
    caller = gevent.spawn(processor.run, "k", lambda _: gevent.sleep(2))
    clock.advance(1.5)
    assert "Callers waiting 1 Batches running 0" in in_a_thread(text, page)
    assert "Callers waiting 1 Batches running 1" in text(page)
    caller.get()


def test_a_page_that_fails_to_count_delays_and_fails_no_batch(
    clock: VirtualTime, processor: Processor[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, metric: BatchMetric, counts: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(history.Seen, "_count", fail)
    page = Page(allow=anybody, processors=[processor])
    assert processor.run("k", lambda _: "saved") == "saved"
    assert "Of 0 operations" in text(page)


# -- in a browser ---------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.timeout(150)
def test_under_load_it_shows_in_a_browser_what_is_hot_and_what_hangs_and_goes_on_by_itself(tmp_path: Path) -> None:
    with (
        database("postgresql", tmp_path) as url,
        store(url, {}) as trains,
        tickets(url, tmp_path, workers=1) as server,
        browser(tmp_path, size="1280,925") as page,
    ):
        row = trains.open_train.table
        with trains._engine.begin() as lock:
            lock.execute(sa.select(row).where(row.c.key == "Night Train").with_for_update())
            asking: list[gevent.Greenlet[..., object]] = [
                gevent.spawn(ask, server, "POST", f"/trains/Night%20Train/seats/{n}", {"passenger": "Ann"})
                for n in (7, 8, 9)
            ]
            asking += [
                gevent.spawn(load, server.host, server.port, ["ICE 1"], 60, 24),
                gevent.spawn(load, server.host, server.port, ["Glacier Express", "Rack Railway"], 60, 6),
            ]
            assert ask(server, "POST", "/trains/Ghost%20Train/seats/1", {"passenger": "Ann"})[0] == 404
            page.open(f"http://{server.host}:{server.port}/admin/batches")
            rates: set[str] = set()

            def went_on() -> bool:
                rates.add(page.content(".operations-rate"))
                return len(rates) > 3

            wait_until(went_on)
            assert "0/s" not in [rate for rate in rates if rate == max(rates)]
            wait_until(lambda: page.content(".keys tbody tr td") == "'ICE 1'")
            assert page.content(".hanging tbody tr td") == "'Night Train'"
            assert "psycopg" in page.content(".hanging pre")
            assert "ResourceMissing" in page.content(".failed tbody")
            page.click(".hanging summary")
            shown = page.content(".operations-rate")
            wait_until(lambda: page.content(".operations-rate") != shown)
            assert page.count(".hanging details[open]") == 1
            wait_until(lambda: page.count("figure rect") >= 12)
            page.click(".hanging summary")
            keep(page.screenshot())
            assert page.content("#stale") == ""
            server.stop()
            wait_until(lambda: page.content("#stale").startswith("These numbers are old"))
        gevent.killall(asking)
