"""What is seen of operations across keys: live batches, counts, metrics, log lines, spans, and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit
from opentelemetry import trace
from prometheus_client import CollectorRegistry

from geventbatch import Conflict
from geventbatch.integrations import opentelemetry, prometheus
from geventbatch.integrations.page import Page
from tests.support.ledger import Callers, Ledger, hold
from tests.watching.test_opentelemetry import Seen
from tests.watching.test_page import anybody, rows, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing import VirtualTime

pytestmark = pytest.mark.usefixtures("no_other_processors")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def seen() -> Iterator[Seen]:
    found = Seen()
    yield found
    opentelemetry.uninstrument()
    found.tracers.shutdown()
    found.meters.shutdown()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "geventbatch"]


# -- live batches and counts ---------------------------------------------------------------------------------------


def test_live_batches_say_who_waits_at_which_key_and_for_whom(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.1)
        for mark, keys in enumerate(["bc", "cd", "d", "e"], 1):
            callers.run(keys, mark)
        clock.advance(0.1)
        shown = {one.keys: (one.phase, one.waits_at, one.waits_for) for one in processor.live_batches()}
        assert shown == {
            ("a", "b"): ("save", (), ()),
            ("b", "c"): ("queued", ("b",), (("a", "b"),)),
            ("c", "d"): ("queued", ("c",), (("b", "c"),)),
            ("d",): ("queued", ("d",), (("c", "d"),)),
            ("e",): ("save", (), ()),
        }
        assert processor.stats().batches == 5
        clock.advance(10)


def test_a_batch_of_one_key_says_so_too(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor(max_batches=1) as processor:
        callers = Callers(processor)
        callers.run("a", 0)
        clock.advance(0.1)
        callers.run("a", 1)
        callers.run("b", 2)
        clock.advance(0.1)
        waits = {(one.keys, one.phase): (one.waits_at, one.waits_for) for one in processor.live_batches()}
        assert waits == {
            (("a",), "save"): ((), ()),
            (("a",), "queued"): (("a",), (("a",),)),
            (("b",), "queued"): ((), ()),  # it waits for a place among max_batches
        }
        clock.advance(10)


def test_an_operation_across_keys_is_one_live_batch_and_none_when_it_has_left(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.save_time = 5
    with ledger.processor(max_duration=60) as processor:
        callers = Callers(processor)
        callers.run("b", "first")
        clock.advance(0.1)
        leaves = callers.run("abc", "leaves")
        callers.run("cd", "behind")
        callers.run("cb", "last")
        clock.advance(0.1)
        assert processor.stats().batches == len(processor.live_batches()) == 4
        leaves.kill()
        assert processor.stats().batches == len(processor.live_batches()) == 3
        clock.advance(5.5)
        assert processor.stats().batches == len(processor.live_batches()) == 1
        ledger.on_load = lambda _: 1 / 0
        for keys in ("bc", "ca", "a"):
            callers.run(keys, keys)
        clock.advance(0.1)
        assert processor.stats().batches == len(processor.live_batches()) == 4
        clock.advance(20)
        assert processor.stats().batches == processor.stats().keys == 0


# -- metrics -------------------------------------------------------------------------------------------------------


def test_the_metric_of_a_component_has_its_keys_and_the_number_of_the_bulks(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        metrics = processor.subscribe_batch_metrics()
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "z"]):
            callers.run(keys, mark)
        clock.advance(1)
        processor.batching = False
        callers.run("xy", "alone")
        clock.advance(1)
    found = [(metric.keys, metric.bulk_keys, metric.operation_count) for metric in metrics]
    assert found == [(("a", "b", "c"), 4, 2), (("z",), 4, 1), (("x", "y"), 0, 1)]


def test_exporters_count_an_operation_across_keys_once_and_no_key_is_a_label(
    clock: VirtualTime, ledger: Ledger
) -> None:
    registry = CollectorRegistry()
    prometheus.watch(registry)
    with ledger.processor(name="ledger") as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["abc", "cd", "e"]):
            callers.run(keys, mark)
        ledger.unloadable = {"f": OSError("no")}
        callers.run("fa", 3)
        clock.advance(1)
    samples = [sample for family in registry.collect() for sample in family.samples]
    outcomes = {
        sample.labels["outcome"]: sample.value for sample in samples if sample.name == "geventbatch_operations_total"
    }
    assert (outcomes["returned"], outcomes["failed"]) == (3, 1)
    (sizes,) = [sample.value for sample in samples if sample.name == "geventbatch_batch_operations_sum"]
    assert sizes == 3
    assert not {value for sample in samples for value in sample.labels.values()} & set("abcdef")


# -- traces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_keys", [False, True])
def test_the_span_of_a_component_has_the_number_of_its_keys_and_links_to_all_its_callers(
    clock: VirtualTime, ledger: Ledger, seen: Seen, *, with_keys: bool
) -> None:
    with ledger.processor(name="seats") as processor:
        seen.instrument(processor, keys=with_keys)
        callers = Callers(processor)

        def call(keys: str, mark: int) -> None:
            with seen.tracer.start_as_current_span(f"caller {mark}"):
                callers._run(keys, mark, None, {})

        for mark, keys in enumerate(["ab", "bc", "z"]):
            gevent.spawn(call, keys, mark)
        clock.advance(1)
        component, single = seen.spans()
        attributes: Any = component.attributes
        assert (attributes["geventbatch.key_count"], attributes["geventbatch.bulk_key_count"]) == (3, 4)
        assert attributes["geventbatch.operation_count"] == len(component.links) == 2
        assert attributes.get("geventbatch.keys") == (("a", "b", "c") if with_keys else None)
        assert "geventbatch.key_count" not in (single.attributes or {})
        (event,) = seen.spans("caller 0")[0].events
        assert (event.attributes or {})["geventbatch.key_count"] == 2
        where = component.get_span_context()
        assert where is not None
        assert (event.attributes or {})["geventbatch.batch.span_id"] == trace.format_span_id(where.span_id)


# -- the log -------------------------------------------------------------------------------------------------------


def test_the_log_names_a_few_of_the_keys_and_how_many_more_there_are(
    clock: VirtualTime, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.on_save = lambda _: 1 / 0
    with ledger.processor(name="ledger") as processor:
        callers = Callers(processor)
        for mark in range(20):
            callers.run("M" + "abcdefghijklmnopqrst"[mark], mark)
        clock.advance(1)
    (line,) = lines(caplog)
    assert line.startswith("ledger: batch of keys 'M', 'a', 'b', 'c', 'd' and 16 more: saving raised ZeroDivisionError")
    assert "callers answered with it: 20" in line


def test_the_log_names_the_key_whose_load_has_failed(
    clock: VirtualTime, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.unloadable = {"b": OSError("no")}
    with ledger.processor(name="ledger") as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "ac"]):
            callers.run(keys, mark)
        clock.advance(1)
    (line,) = lines(caplog)
    assert line.startswith("ledger: batch of key 'b': loading raised OSError('no')")
    assert "callers answered with it: 2" in line


def test_the_log_names_all_that_a_killed_worker_had(
    clock: VirtualTime, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger.processor(name="ledger") as processor:
        callers = Callers(processor)

        def kill_itself(accounts: Any, mark: Any) -> None:
            raise GreenletExit(mark)

        callers.run("ab", 0)
        callers.run("cd", 1, kill_itself)
        clock.advance(1)
    assert "ledger: batch of keys 'a', 'b', 'c', 'd': its worker was killed by GreenletExit(1)" in "\n".join(
        lines(caplog)
    )


def test_the_log_names_the_keys_of_what_hangs_past_its_deadline(
    clock: VirtualTime, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger.processor(name="ledger", max_duration=5) as processor:
        callers = Callers(processor)

        def hang(accounts: Any, mark: Any) -> None:
            try:
                gevent.sleep(100)
            finally:
                gevent.sleep(3)

        callers.run("ab", 0, hang)
        callers.run("bc", 1)
        clock.advance(20)
    told = lines(caplog)
    assert told[0].startswith("ledger: batch of keys 'a', 'b', 'c': max_duration of 5 s passed while it was applying")
    assert told[1].startswith("ledger: batch of keys 'a', 'b': its code has returned 3.000 s after its deadline")


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_counts_an_operation_at_each_of_its_keys_and_tells_of_one_in_nearly_all(
    clock: VirtualTime, ledger: Ledger
) -> None:
    with ledger.processor() as processor:
        page = Page(allow=anybody, processors=[processor])
        callers = Callers(processor)
        for mark in range(30):
            callers.run("M" + "abc"[mark % 3] if mark % 10 else "z", mark)
        clock.advance(1)
        assert rows(page, "keys")[0].split() == ["'M'", "27", "90.0", "%"]
        assert "The key 'M' was in 90.0 % of the operations of the last minute" in text(page)
        clock.advance(120)
        for mark in range(30):
            callers.run("M" if mark % 10 else "ab", mark)
        clock.advance(1)
        assert "of the operations of the last minute" not in text(page)  # most of them had one key: that is batching


def test_the_page_shows_who_waits_for_whom_and_at_which_key_nearly_all_do(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        page = Page(allow=anybody, processors=[processor])
        callers = Callers(processor)
        assert "Who waits for whom" not in text(page)
        callers.run("M", "first", hold)
        clock.advance(0.1)
        for mark in range(12):
            callers.run("M" + "abcdefghijkl"[mark], mark)
        clock.advance(2)
        assert "Who waits for whom, the first 10 of 12" in text(page)
        assert rows(page, "blocked")[0].split() == ["'M'", ",", "'a'", "2.0", "s", "'M'", "'M'"]
        assert "100.0 % of the 12 that wait for others wait at the key 'M'" in text(page)
        clock.advance(20)
        assert "Who waits for whom" not in text(page)


def test_the_page_names_the_keys_of_a_batch_that_failed(clock: VirtualTime, ledger: Ledger) -> None:
    def fail(_: object) -> None:
        raise Conflict("always")

    ledger.on_save = fail
    with ledger.processor(max_attempts=1) as processor:
        page = Page(allow=anybody, processors=[processor])
        callers = Callers(processor)
        for mark in range(7):
            callers.run("M" + "abcdefg"[mark], mark)
        clock.advance(1)
        (row,) = rows(page, "failed")
        assert "'M' , 'a' , 'b' , 'c' , 'd' and 3 more" in row
