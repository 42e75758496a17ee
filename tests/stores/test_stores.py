"""The contract of all stores, in every mode, on every server: each test runs over all cases that have what it needs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import gevent
import pytest
from gevent.event import Event

from geventbatch import (
    BatchAborted,
    BatchError,
    IdempotencyKeyReused,
    LoadFailed,
    ResourceMissing,
    SaveFailed,
    current_batch,
)
from geventbatch._core import process as _process
from tests.support.adapters.base import Adapter, TooLittle, cases
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch import Processor
    from tests.support.adapters.base import Case, Step
    from tests.support.proxy import Proxy

ROOT = Path(__file__).parents[2]

ALL = cases()

ODD_KEYS = [
    "",
    " ",
    "  spaces  ",
    "tab\tand\nnewline\r\n",
    "'single' \"double\" `back`",
    "'; DROP TABLE students; --",
    "100 % %s %(key)s %%",
    "{braces} ${dollar} :colon ?",
    "back\\slash \\n \\x00",
    "*?[a-z]",
    "Grüße, 你好, עברית",
    "🚆 e\N{COMBINING ACUTE ACCENT} \N{LATIN SMALL LETTER E WITH ACUTE}",
    "\x01\x7f\x1b[0m",
    "NULL",
    "0042",
    "-1",
]

SHORT = 0.3
"""Seconds: a deadline that a test waits for."""


def over(has: Callable[[Case], object] = lambda _: True) -> pytest.MarkDecorator:
    """Run the test over all cases that have something."""
    params = [pytest.param(case, id=case.name, marks=case.marks) for case in ALL if has(case)]
    return pytest.mark.parametrize("case", params)


over_idempotent = over(lambda case: case.has_outcomes)

over_some_idempotent = over(
    lambda case: (
        (case.name.startswith("redis") and case.has_outcomes)
        or case.name
        in {
            "sqlalchemy-document-lock-postgresql",
            "sqlalchemy-mapped-version-sqlite",
            "sqlalchemy-mapped-lock-mariadb",
            "django-xmin-postgresql",
            "django-version-postgresql-plain",
        }
    )
)
"""For what hardly depends on mode and server."""


def over_slow_steps(*steps: Step) -> pytest.MarkDecorator:
    """Run the test over all these steps that a case can slow down."""
    return pytest.mark.parametrize(
        ("case", "step"),
        [
            pytest.param(case, step, id=f"{case.name}-{step}", marks=case.marks)
            for case in ALL
            for step in case.slow_steps
            if step in steps
        ],
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], str]]:
    """Gives the address of a case's place, which is there until the last test has ended."""
    with ExitStack() as stack:
        yield cache(lambda case: stack.enter_context(case.fresh(tmp_path_factory.mktemp("place"))))


@pytest.fixture
def adapter(case: Case, place: Callable[[Case], str], tmp_path: Path) -> Iterator[Adapter]:
    with ExitStack() as stack:
        opened = stack.enter_context(case.opens(place(case)))
        if type(opened).clear is Adapter.clear:
            opened = stack.enter_context(case.opens(stack.enter_context(case.fresh(tmp_path))))
        else:
            stack.callback(opened.clear)
        yield opened


@pytest.fixture
def processor(adapter: Adapter) -> Iterator[Processor[Any]]:
    """One that raises for what is missing; at "k" there is a total of 10."""
    adapter.put("k", 10)
    with adapter.processor(max_attempts=20) as opened:
        yield opened


def spawned(run: Callable[..., Any], *args: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(answer_of, run, *args)


def all_of(running: list[gevent.Greenlet[..., Any]]) -> list[Any]:
    return [one.get() for one in running]


def proxy_of(adapter: Adapter) -> Proxy:
    assert adapter.proxy is not None
    return adapter.proxy


class Pause:
    """An operation that waits before it does what it is to do, the first time that it runs."""

    def __init__(self, operation: Callable[[Any], Any]) -> None:
        self._operation = operation
        self.reached = Event()
        self.ended = Event()
        self.runs = 0

    def __call__(self, resource: Any) -> Any:
        self.runs += 1
        self.reached.set()
        self.ended.wait()
        return self._operation(resource)


@contextmanager
def paused(adapter: Adapter, processor: Processor[Any]) -> Iterator[gevent.Greenlet[..., Any]]:
    """While in the block, a batch of "k", which adds 1, is between load and save."""
    pause = Pause(lambda resource: adapter.add(resource, 1))
    caller = spawned(processor.run, "k", pause)
    pause.reached.wait()
    try:
        yield caller
    finally:
        pause.ended.set()
    caller.join()


def assert_true(adapter: Adapter, outcome: Any, *, before: int, after: int) -> None:
    """What the caller was told about a change from *before* to *after* is the truth."""
    found = adapter.get("k")
    if not isinstance(outcome, BaseException):
        assert (outcome, found) == (after, after)
    elif isinstance(outcome, BatchError) and outcome.retry_safe:
        assert found == before, outcome
    else:
        assert isinstance(outcome, BatchError)
        assert found in {before, after}


def assert_as_good_as_new(adapter: Adapter) -> None:
    """All connections are back, and as many batches as there can be run side by side."""
    wait_until(lambda: adapter.busy_connections() == 0)
    entered: set[int] = set()
    everybody = Event()

    def meet(resource: Any, number: int) -> int:
        entered.add(number)
        if len(entered) == adapter.pool_size:
            everybody.set()
        everybody.wait()
        return adapter.add(resource, number)

    apart = {"max_bulk": 1} if adapter.bulk else {}  # of one bulk, one after the other would run
    with adapter.processor(missing="make", **apart) as processor:
        callers = [spawned(processor.run, f"n{n}", meet, n) for n in range(adapter.pool_size)]
        assert all_of(callers) == list(range(adapter.pool_size))
    wait_until(lambda: adapter.busy_connections() == 0)
    wait_until(lambda: adapter.open_connections() <= adapter.pool_size)  # a server takes its time to end one


# -- from load to save ------------------------------------------------------------------------------------------


@over()
def test_what_one_batch_has_saved_the_next_one_loads_and_a_foreign_reader_sees(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    assert processor.run("k", adapter.add, 5) == 15
    assert adapter.get("k") == 15
    adapter.put("k", 100)
    assert processor.run("k", adapter.add, 1) == 101
    assert adapter.get("k") == 101


@over()
def test_a_thousand_operations_are_saved_together(adapter: Adapter, processor: Processor[Any]) -> None:
    metrics = processor.subscribe_batch_metrics()
    answers = all_of([spawned(processor.run, "k", adapter.add, 1) for _ in range(1000)])
    assert sorted(answers) == list(range(11, 1011))
    assert adapter.get("k") == 1010
    processor.stop()
    assert sum(1 for _ in metrics) <= 10


@over()
def test_keys_are_apart_from_each_other(adapter: Adapter) -> None:
    with adapter.processor(missing="make") as processor:
        answers = all_of([spawned(processor.run, f"n{n}", adapter.add, n) for n in range(12)])
    assert answers == list(range(12))
    assert [adapter.get(f"n{n}") for n in range(12)] == answers


@over()
def test_an_operation_that_raises_changes_nothing_and_gives_its_connection_back(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    def refuse(resource: Any) -> None:
        raise LookupError("no")

    assert repr(answer_of(processor.run, "k", refuse)) == repr(LookupError("no"))
    assert adapter.get("k") == 10


@over()
def test_a_half_done_change_of_a_broken_operation_is_not_saved(adapter: Adapter) -> None:
    def break_off(resource: Any) -> None:
        adapter.add(resource, 1000)
        raise LookupError("half-way")

    adapter.put("k", 10)
    with adapter.processor(clean_errors=()) as processor:
        callers = [spawned(processor.run, "k", *run) for run in ((adapter.add, 1), (break_off,), (adapter.add, 1))]
        first, broken, last = all_of(callers)
    assert (first, last) == (11, 12)
    assert isinstance(broken, LookupError)
    assert adapter.get("k") == 12


@over()
def test_with_batching_off_every_caller_is_right_by_itself(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(batching=False, max_attempts=200) as processor:
        # As many as there are connections: who waits for one of a pool holds its deadline only.
        for _ in range(3):
            callers = [spawned(processor.run, "k", adapter.add, 1) for _ in range(adapter.pool_size)]
            assert not [answer for answer in all_of(callers) if isinstance(answer, BaseException)]
    assert adapter.get("k") == 10 + 3 * adapter.pool_size


# -- keys -------------------------------------------------------------------------------------------------------


@over()
def test_a_key_may_have_any_character(case: Case, adapter: Adapter) -> None:
    keys = [*ODD_KEYS, "x" * case.longest_key, *(["nul\0", "nul"] if case.nul_in_keys else [])]
    with adapter.processor(missing="make", workers=1) as processor:
        for number, key in enumerate(keys):
            processor.run(key, adapter.add, number)
        assert [processor.run(key, adapter.total) for key in keys] == list(range(len(keys)))
    assert [adapter.get(key) for key in keys] == list(range(len(keys)))


@over()
def test_a_number_and_its_digits_are_one_resource_and_one_batch(adapter: Adapter) -> None:
    adapter.put("42", 10)
    with adapter.processor(min_duration=0.05) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = all_of([spawned(processor.run, key, adapter.add, 1) for key in (42, "42")])
    assert answers == [11, 12]
    assert adapter.get("42") == 12
    assert len(list(metrics)) == 1


@over()
def test_keys_that_the_store_cannot_have_are_refused_at_the_door_by_name(adapter: Adapter) -> None:
    keys: list[Any] = [1.5, ("a", "b"), True, None]
    with adapter.processor() as processor:
        for key in keys:
            error = answer_of(processor.run, key, adapter.add, 1)
            assert isinstance(error, (TypeError, ValueError))
            assert repr(key) in str(error)


# -- what is not there ------------------------------------------------------------------------------------------


@over()
def test_a_resource_that_is_missing_fails_its_load_by_name(adapter: Adapter, processor: Processor[Any]) -> None:
    error = answer_of(processor.run, "nowhere", adapter.add, 1)
    assert isinstance(error, ResourceMissing)
    assert error.key == "nowhere"
    assert "nowhere" in str(error)
    assert adapter.get("nowhere") is None


@over()
def test_a_resource_that_is_missing_is_made(adapter: Adapter) -> None:
    with adapter.processor(missing="make") as processor:
        assert processor.run("new", adapter.add, 1) == 1
        assert adapter.get("new") == 1
        assert processor.run("new", adapter.add, 1) == 2
    assert adapter.get("new") == 2


@over()
def test_a_resource_that_somebody_inserts_before_the_first_save_is_not_overwritten(
    case: Case, adapter: Adapter
) -> None:
    with adapter.processor(missing="make", max_attempts=20) as processor:
        with paused(adapter, processor) as caller:
            writer = spawned(adapter.put, "k", 100)
            writer.join(timeout=5 if not case.has_locks else 0.3)  # where what is not there can be locked, it waits
        writer.get()
        found = caller.get()
    assert (found, adapter.get("k")) in {(101, 101), (1, 100)}


@over()
def test_a_deleted_resource_is_gone_and_may_come_again(adapter: Adapter, processor: Processor[Any]) -> None:
    assert processor.run("k", delete) is None
    assert adapter.get("k") is None
    assert isinstance(answer_of(processor.run, "k", adapter.add, 1), ResourceMissing)
    with adapter.processor(missing="make") as making:
        assert making.run("k", adapter.add, 3) == 3
    assert adapter.get("k") == 3


@over()
def test_who_comes_after_a_deletion_in_the_same_batch_finds_nothing(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.05) as processor:
        callers = [spawned(processor.run, "k", *run) for run in ((adapter.add, 1), (delete,), (adapter.add, 1))]
        first, second, third = all_of(callers)
    assert (first, second) == (11, None)
    assert isinstance(third, ResourceMissing)
    assert adapter.get("k") is None


@over()
def test_who_comes_after_a_deletion_in_the_same_batch_makes_a_new_one(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(missing="make", min_duration=0.05) as processor:
        callers = [spawned(processor.run, "k", *run) for run in ((adapter.add, 1), (delete,), (adapter.add, 1))]
        assert all_of(callers) == [11, None, 1]
    assert adapter.get("k") == 1


def delete(resource: Any) -> None:
    current_batch().delete()


@over(lambda case: case.can_corrupt)
def test_a_state_that_nobody_can_decode_fails_the_load_by_name(adapter: Adapter, processor: Processor[Any]) -> None:
    adapter.put("broken-key", 1)
    adapter.corrupt("broken-key")
    error = answer_of(processor.run, "broken-key", adapter.add, 1)
    assert isinstance(error, LoadFailed)
    assert not isinstance(error, ResourceMissing)
    assert "broken-key" in str(error.__cause__)
    adapter.put("broken-key", 1)
    assert processor.run("broken-key", adapter.add, 1) == 2


# -- foreign writers --------------------------------------------------------------------------------------------


@over(lambda case: not case.has_locks)
def test_what_a_foreign_writer_saves_between_load_and_save_is_kept(adapter: Adapter, processor: Processor[Any]) -> None:
    metrics = processor.subscribe_batch_metrics()
    with paused(adapter, processor) as caller:
        adapter.put("k", 100)
    assert caller.get() == 101
    assert adapter.get("k") == 101
    processor.stop()
    assert [metric.attempts for metric in metrics] == [2]


@over(lambda case: not case.has_locks)
def test_a_resource_that_a_foreign_writer_deletes_between_load_and_save_stays_deleted(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    with paused(adapter, processor) as caller:
        adapter.remove("k")
    assert isinstance(caller.get(), ResourceMissing)
    assert adapter.get("k") is None


@over(lambda case: case.has_locks)
def test_a_foreign_writer_waits_until_the_batch_is_saved(adapter: Adapter, processor: Processor[Any]) -> None:
    with paused(adapter, processor) as caller:
        writer = spawned(adapter.put, "k", 100)
        writer.join(timeout=0.2)
        assert not writer.ready()
    writer.get()
    assert caller.get() == 11
    assert adapter.get("k") == 100


@over(lambda case: case.has_locks)
def test_a_batch_waits_for_a_foreign_writer(adapter: Adapter, processor: Processor[Any]) -> None:
    with adapter.holding("k", 100):
        caller = spawned(processor.run, "k", adapter.add, 1)
        caller.join(timeout=0.2)
        assert not caller.ready()
    assert caller.get() == 101
    assert adapter.get("k") == 101


@over(lambda case: case.has_locks)
def test_a_lock_that_nobody_lets_go_ends_at_the_deadline_and_nothing_is_saved(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(max_duration=SHORT) as processor, adapter.holding("k", 100):
        error = answer_of(processor.run, "k", adapter.add, 1)
        assert isinstance(error, BatchError)
        assert error.retry_safe
    assert adapter.get("k") == 100
    assert_as_good_as_new(adapter)


@over()
def test_two_processes_that_race_for_first_inserts_and_for_versions_lose_nothing(
    case: Case, adapter: Adapter, another: Another
) -> None:
    with adapter.processor(missing="make", max_attempts=200) as processor, another.opened(case, adapter):
        # First with what can be the worst moment: a whole batch of the other process between our load and save.
        with paused(adapter, processor) as caller:
            told = spawned(another.raise_totals, ["k"], 1)
            told.join(timeout=0.5)  # where what is not there can be locked, it waits for us
        assert told.get() == []
        assert sorted((caller.get(), adapter.get("k"))) in [[1, 2], [2, 2]]
        keys = [f"n{n}" for n in range(5)]
        told = spawned(another.raise_totals, keys, 10)
        ours = [spawned(raise_totals, adapter, processor, key, 10) for key in keys]
        assert all_of(ours) == [None] * len(keys)
        assert told.get() == []
    assert [adapter.get(key) for key in ["k", *keys]] == [2, *[20] * len(keys)]


def raise_totals(adapter: Adapter, processor: Processor[Any], key: str, times: int) -> None:
    for _ in range(times):
        processor.run(key, adapter.add, 1)


class Another:
    """A process that opens the same stores (tests/support/programs/store.py)."""

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.support.programs.store"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @contextmanager
    def opened(self, case: Case, adapter: Adapter) -> Iterator[None]:
        """While in the block, it has this store."""
        try:
            assert self._asked({"case": case.name, "address": adapter.address}) == "opened"
            yield
            assert self._asked({}) == "closed"
        except BaseException:  # so that the next test meets one that has nothing to do
            self._process.kill()
            self._process.communicate()
            self._start()
            raise

    def raise_totals(self, keys: list[str], times: int) -> Any:
        """Have it raise them all at the same time, so many times; give what went wrong there."""
        return self._asked({"keys": keys, "times": times})

    def transfers(self, sent: list[tuple[list[str], str]], together: int) -> Any:
        """Have it send these transfers of 1, so many *together*, each with its idempotency key; give the answers."""
        return self._asked({"transfers": sent, "together": together})

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self._process.kill()

    def _asked(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def another() -> Iterator[Another]:
    with Another() as process:
        yield process


# -- rows beside the resource -----------------------------------------------------------------------------------


@over(lambda case: case.has_rows)
def test_rows_beside_the_resource_are_saved_with_it_in_their_order(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.05) as processor:
        callers = [spawned(processor.run, "k", adapter.add_with_row, 1, f"row {n}") for n in range(5)]
        assert all_of(callers) == [11, 12, 13, 14, 15]
    assert adapter.rows() == [f"row {n}" for n in range(5)]


@over(lambda case: case.has_rows)
def test_a_row_of_an_operation_that_raises_is_dropped(adapter: Adapter) -> None:
    def refuse(resource: Any) -> None:
        current_batch().add_row(adapter.row("dropped"))
        raise LookupError("no")

    adapter.put("k", 10)
    with adapter.processor(min_duration=0.05) as processor:
        callers = [
            spawned(processor.run, "k", *run)
            for run in ((adapter.add_with_row, 1, "first"), (refuse,), (adapter.add_with_row, 1, "last"))
        ]
        first, refused, last = all_of(callers)
    assert (first, last) == (11, 12)
    assert isinstance(refused, LookupError)
    assert adapter.rows() == ["first", "last"]


@over(lambda case: case.has_rows)
def test_a_row_is_saved_once_when_its_batch_is_replayed(adapter: Adapter) -> None:
    def break_off(resource: Any) -> None:
        current_batch().add_row(adapter.row("dropped"))
        raise LookupError("half-way")

    adapter.put("k", 10)
    with adapter.processor(min_duration=0.05, clean_errors=()) as processor:
        callers = [
            spawned(processor.run, "k", *run)
            for run in ((adapter.add_with_row, 1, "first"), (break_off,), (adapter.add_with_row, 1, "last"))
        ]
        first, broken, last = all_of(callers)
    assert (first, last) == (11, 12)
    assert isinstance(broken, LookupError)
    assert adapter.rows() == ["first", "last"]


@over(lambda case: case.has_rows)
def test_rows_of_a_batch_that_changes_nothing_else_are_saved(adapter: Adapter, processor: Processor[Any]) -> None:
    assert processor.run("k", adapter.add_with_row, 0, "alone") == 10
    assert adapter.rows() == ["alone"]


@over(lambda case: case.has_rows)
def test_a_row_that_violates_a_constraint_fails_its_own_operation_only(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.1) as processor:
        metrics = processor.subscribe_batch_metrics()
        texts = [f"row {n}" for n in range(30)]
        texts[17] = "row 3"
        answers = all_of([spawned(processor.run, "k", adapter.add_with_row, 1, text) for text in texts])
    culprits = [answer for answer in answers if isinstance(answer, BaseException)]
    assert [class_of(culprit) for culprit in culprits] == ["IntegrityError"]
    assert answers[17] is culprits[0]
    assert adapter.get("k") == 10 + 29
    assert sorted(adapter.rows()) == sorted(set(texts))
    assert sum(metric.attempts for metric in metrics) <= 20


def class_of(error: object) -> str:
    """The class of a database's error, of which a driver may raise an exacter one."""
    return next((one.__name__ for one in type(error).__mro__ if one.__name__ == "IntegrityError"), type(error).__name__)


@over(lambda case: case.has_sql)
def test_what_an_operation_inserts_by_itself_is_saved_with_the_batch(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    def change(resource: Any) -> int:
        adapter.insert(resource, "inserted")
        return adapter.add(resource, 1)

    assert processor.run("k", change) == 11
    assert adapter.rows() == ["inserted"]


@over(lambda case: case.has_sql)
def test_a_constraint_that_an_operations_own_sql_violates_fails_that_operation_only(adapter: Adapter) -> None:
    def change(resource: Any, text: str) -> int:
        adapter.insert(resource, text)
        return adapter.add(resource, 1)

    adapter.put("k", 10)
    with adapter.processor(min_duration=0.1) as processor:
        callers = [spawned(processor.run, "k", change, text) for text in ("a", "b", "a", "c")]
        first, second, culprit, last = all_of(callers)
    assert (first, second, last) == (11, 12, 13)
    assert class_of(culprit) == "IntegrityError"
    assert adapter.get("k") == 13
    assert adapter.rows() == ["a", "b", "c"]


# -- idempotency keys -------------------------------------------------------------------------------------------


@over_idempotent
def test_what_was_saved_under_an_idempotency_key_is_not_applied_again(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    adapter.put("another", 0)
    runs = [("k", "a"), ("k", "a"), ("k", "b"), ("another", "a"), ("another", "a")]
    assert [processor.run(key, adapter.add, 5, idempotency_key=name) for key, name in runs] == [15, 15, 20, 5, 5]
    assert (adapter.get("k"), adapter.get("another")) == (20, 5)
    assert adapter.outcomes() == 3


@over_idempotent
def test_in_one_batch_repeated_operations_get_what_there_was_and_all_others_are_saved_in_order(
    adapter: Adapter,
) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.02) as processor:
        assert processor.run("k", adapter.add, 5, idempotency_key="old") == 15
        metrics = processor.subscribe_batch_metrics()
        keys = [None, "a", "old", "b", "a", None, "old"]
        callers = [spawned(keyed, processor, key, adapter.add, 5 if key == "old" else 1) for key in keys]
        assert all_of(callers) == [16, 17, 15, 18, 17, 19, 15]
    assert adapter.get("k") == 19
    assert adapter.outcomes() == 3
    assert [metric.attempts for metric in metrics] == [2]


@over_idempotent
def test_a_thousand_operations_that_are_sent_again_are_applied_once(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.1) as processor:
        sent = [all_of([spawned(keyed, processor, f"{n}", adapter.add, 1) for n in range(1000)]) for _ in range(2)]
    assert sent[0] == list(range(11, 1011)) == sent[1]
    assert adapter.get("k") == 1010


@over_some_idempotent
def test_an_idempotency_key_with_other_arguments_is_refused_by_name(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.02, clean_errors=()) as processor:
        runs = [("a", adapter.add, 5), ("a", adapter.add, 6), ("a", adapter.total), (None, adapter.add, 1)]
        for total in (16, 17):  # in the batch of the first one, and after that
            first, *refused, last = all_of([spawned(keyed, processor, *run) for run in runs])
            assert (first, last) == (15, total)
            for error in refused:
                assert isinstance(error, IdempotencyKeyReused)
                assert (error.key, error.idempotency_key, error.retry_safe) == ("k", "a", True)
                assert "'k'" in str(error)
                assert "'a'" in str(error)
    assert adapter.get("k") == 17


@over_idempotent
def test_what_an_operation_raises_is_the_outcome_and_is_given_again(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(missing="make") as processor:
        errors = [answer_of(keyed, processor, "a", adapter.take, 11)]
        assert adapter.get("k") == 10
        adapter.put("k", 100)
        errors += [answer_of(keyed, processor, "a", adapter.take, 11)]
        assert processor.run("new", adapter.total, idempotency_key="b") == 0
        assert isinstance(answer_of(processor.run, "new 2", adapter.take, 11, idempotency_key="b"), TooLittle)
    assert [(type(error), error.args, error.left) for error in errors] == [(TooLittle, ("only 10 left",), 10)] * 2
    assert errors[0] is not errors[1]
    assert adapter.get("k") == 100
    assert adapter.get("new 2") is None


@over_some_idempotent
def test_an_error_that_is_not_among_recorded_errors_is_not_recorded_and_may_be_sent_again(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(recorded_errors=(), min_duration=0.02) as processor:
        callers = [spawned(keyed, processor, key, adapter.take, 11) for key in ("a", None)]
        callers += [spawned(keyed, processor, "b", adapter.add, 1)]
        *broken, other = all_of(callers)
        assert [type(error) for error in broken] == [TooLittle, TooLittle]
        assert (other, adapter.get("k"), adapter.outcomes()) == (11, 11, 1)
        assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12


@over_some_idempotent
def test_a_repeated_operation_that_fails_for_what_it_has_done_itself_gets_its_first_outcome(adapter: Adapter) -> None:
    adapter.put("k", 10)
    for errors in ((), (LookupError,)):
        with adapter.processor(clean_errors=errors, min_duration=0.02) as processor:
            answers = [processor.run("k", adapter.take, 6, idempotency_key=f"{len(errors)}")]
            callers = [spawned(keyed, processor, f"{len(errors)}", adapter.take, 6)]
            callers += [spawned(processor.run, "k", adapter.add, 6)]
            answers += all_of(callers)
        assert answers == [4, 4, 10]


@over_idempotent
def test_an_outcome_that_has_expired_is_forgotten(adapter: Adapter, processor: Processor[Any]) -> None:
    runs = [("a", 1), ("b", 1), ("c", 1)]
    for total in (13, 16):
        answers = [processor.run("k", adapter.add, amount, idempotency_key=key) for key, amount in runs * 2]
        assert answers == [total - 2, total - 1, total] * 2
        adapter.expire_outcomes()
    assert processor.run("k", adapter.add, 2, idempotency_key="a") == 18


@over_some_idempotent
def test_an_outcome_that_has_expired_costs_no_attempt(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(max_attempts=1) as processor:
        for total in (11, 12):
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == total
            adapter.expire_outcomes()


@over_idempotent
def test_of_two_processors_that_are_given_one_idempotency_key_at_once_one_applies_it(adapter: Adapter) -> None:
    adapter.put("k", 10)
    for key in ("k", "new"):
        keys = "ab"
        with ExitStack() as stack:
            both = [
                stack.enter_context(adapter.processor(missing="make", max_attempts=50, min_duration=0.02))
                for _ in range(2)
            ]
            callers = [[spawned(keyed_at, one, key, name, adapter.add, 1) for name in (*keys, None)] for one in both]
            first, second = (all_of(some) for some in callers)
        before = 10 if key == "k" else 0
        assert first[:2] == second[:2]
        assert sorted([*first, second[2]]) == [before + n for n in range(1, 5)]
        assert adapter.get(key) == before + 4


@over_some_idempotent
def test_with_batching_off_an_idempotency_key_holds_too(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(batching=False, max_attempts=200) as processor:
        callers = [spawned(keyed, processor, "a", adapter.add, 1) for _ in range(adapter.pool_size)]
        assert all_of(callers) == [11] * adapter.pool_size
        assert processor.run("k", adapter.add, 1, idempotency_key="a", start_timeout=30) == 11
        refused = answer_of(processor.run, "k", adapter.add, 2, idempotency_key="a", start_timeout=30)
    assert isinstance(refused, IdempotencyKeyReused)
    assert adapter.get("k") == 11


@over_idempotent
def test_a_deletion_that_is_sent_again_does_not_delete_what_has_come_since(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(missing="make", min_duration=0.02) as processor:
        callers = [spawned(keyed, processor, key, *run) for key, *run in (("a", delete), ("b", adapter.add, 1))]
        assert all_of(callers) == [None, 1]
        assert all_of([spawned(keyed, processor, "a", delete), spawned(processor.run, "k", adapter.add, 1)]) == [
            None,
            2,
        ]
    assert adapter.get("k") == 2


@over(lambda case: case.has_outcomes and case.has_rows)
def test_a_repeated_operation_is_told_before_its_row_violates_a_constraint(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.02) as processor:
        for answers in ([11, 12], [11, 13]):
            callers = [spawned(keyed, processor, "a", adapter.add_with_row, 1, "row")]
            callers += [spawned(processor.run, "k", adapter.add_with_row, 1, f"row {answers[1]}")]
            assert all_of(callers) == answers
    assert adapter.rows() == ["row", "row 12", "row 13"]


@over(lambda case: case.has_sql and case.has_outcomes)
def test_a_repeated_operation_gets_its_outcome_when_its_own_sql_violates_a_constraint(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.02) as processor:
        for answers in ([None, 11], [None, 12]):
            callers = [spawned(keyed, processor, "a", adapter.insert, "row")]
            callers += [spawned(processor.run, "k", adapter.add, 1)]
            assert all_of(callers) == answers
    assert adapter.rows() == ["row"]


@over(lambda case: case.has_outcomes and case.has_rows)
def test_a_culprit_of_a_constraint_is_not_recorded_and_the_others_are(adapter: Adapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(min_duration=0.02) as processor:
        for _ in range(2):
            callers = [spawned(keyed, processor, f"{n}", adapter.add_with_row, 1, f"row {n % 3}") for n in range(4)]
            *answers, culprit = all_of(callers)
            assert answers == [11, 12, 13]
            assert class_of(culprit) == "IntegrityError"
    assert (adapter.get("k"), adapter.outcomes()) == (13, 3)


@over(lambda case: case.has_outcomes and case.has_pool and case.has_rows)
def test_outcomes_that_have_expired_are_purged(adapter: Adapter) -> None:
    adapter.put("k", 10)
    store: Any = adapter.store()
    with adapter.processor() as processor:
        for number in range(5):
            processor.run("k", adapter.add, 1, idempotency_key=f"{number}")
        adapter.expire_outcomes()
        processor.run("k", adapter.add, 1, idempotency_key="new")
    assert [store.purge_outcomes(limit=3) for _ in range(3)] == [3, 2, 0]
    assert adapter.outcomes() == 1


@over(lambda case: case.has_outcomes and case.has_proxy)
def test_who_sends_again_after_the_answer_to_a_commit_was_lost_gets_the_outcome(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    rule = proxy_of(adapter).cut_after(adapter.commit_marker, adapter.commit_answer)
    answer_of(processor.run, "k", adapter.add, 1, idempotency_key="a")
    assert rule.met == 1
    assert [processor.run("k", adapter.add, 1, idempotency_key="a") for _ in range(2)] == [11, 11]
    assert adapter.get("k") == 11
    assert_as_good_as_new(adapter)


@over(lambda case: case.has_outcomes and case.has_proxy)
def test_who_sends_again_until_there_is_an_answer_is_applied_once_whatever_message_is_cut_off(
    case: Case, adapter: Adapter
) -> None:
    dice = random.Random(case.name)
    proxy = proxy_of(adapter)
    adapter.put("k", 10)

    def send(processor: Processor[Any], key: str) -> int:
        while True:
            try:
                return processor.run("k", adapter.add, 1, idempotency_key=key)
            except BatchError:
                gevent.sleep(0)

    with adapter.processor(max_attempts=10) as processor:
        for turn in range(10):
            marker = dice.choice([ANY, adapter.commit_marker])
            _ = proxy.cut_before(marker) if dice.random() < 0.5 else proxy.cut_after(marker)
            keys = [f"{turn - number}" for number in range(3)]  # some of them not for the first time
            told = all_of([spawned(send, processor, key) for key in keys])
            proxy.forget_rules()
            assert not [one for one in told if isinstance(one, BaseException)]
    assert adapter.get("k") == 10 + 12
    assert adapter.outcomes() == 12


def keyed(processor: Processor[Any], key: str | None, operation: Callable[..., Any], *args: Any) -> Any:
    return keyed_at(processor, "k", key, operation, *args)


def keyed_at(processor: Processor[Any], at: str, key: str | None, operation: Callable[..., Any], *args: Any) -> Any:
    return processor.run(at, operation, *args, idempotency_key=key)


# -- when things break ------------------------------------------------------------------------------------------


@over_slow_steps("load", "operation")
def test_a_deadline_before_the_save_saves_nothing(adapter: Adapter, step: Step) -> None:
    adapter.put("k", 10)
    with adapter.processor(max_duration=SHORT) as processor:
        with adapter.slow(step):
            error = answer_of(processor.run, "k", operation_of(adapter, step))
        assert isinstance(error, BatchError)
        assert error.retry_safe
        assert_as_good_as_new(adapter)
        assert adapter.get("k") == 10
        assert processor.run("k", adapter.add, 1) == 11


@over_slow_steps("save", "commit")
def test_after_a_deadline_in_the_save_the_caller_was_told_the_truth(adapter: Adapter, step: Step) -> None:
    adapter.put("k", 10)
    with adapter.processor(max_duration=SHORT) as processor:
        with adapter.slow(step):
            outcome = answer_of(processor.run, "k", adapter.add, 1)
        assert isinstance(outcome, BatchError)
        assert_as_good_as_new(adapter)
        assert_true(adapter, outcome, before=10, after=11)
        now = adapter.get("k")
        assert now is not None
        assert processor.run("k", adapter.add, 1) == now + 1


@over_slow_steps("load", "operation", "save", "commit")
def test_a_worker_that_is_killed_in_a_statement_gives_its_connection_back(adapter: Adapter, step: Step) -> None:
    adapter.put("k", 10)
    with adapter.processor() as processor:
        with adapter.slow(step) as reached:
            caller = spawned(processor.run, "k", operation_of(adapter, step))
            wait_until(reached)
            worker: Any = next(iter(_process.running))
            worker.kill(block=False)
            outcome = caller.get()
        assert isinstance(outcome, BatchAborted)
        assert_as_good_as_new(adapter)
        assert_true(adapter, outcome, before=10, after=11)


def operation_of(adapter: Adapter, step: Step) -> Callable[[Any], int]:
    """One that adds 1, and sends SQL of its own when that is the step."""

    def operation(resource: Any) -> int:
        if step == "operation":
            adapter.insert(resource, "slow")
        return adapter.add(resource, 1)

    return operation


@over_slow_steps("load", "operation", "save", "commit")
def test_after_connections_were_ended_in_a_statement_the_caller_was_told_the_truth(
    adapter: Adapter, step: Step
) -> None:
    adapter.put("k", 10)
    with adapter.processor(max_duration=10) as processor:
        with adapter.slow(step) as reached:
            caller = spawned(processor.run, "k", operation_of(adapter, step))
            wait_until(reached)
            adapter.terminate()
        outcome = caller.get()
        assert_as_good_as_new(adapter)
        assert_true(adapter, outcome, before=10, after=11)
        now = adapter.get("k")
        assert now is not None
        assert processor.run("k", adapter.add, 1) == now + 1


@over(lambda case: case.has_pool)
def test_connections_that_were_ended_at_rest_hurt_one_batch_at_the_most(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    assert processor.run("k", adapter.add, 1) == 11
    assert adapter.open_connections() > 0
    adapter.terminate()
    wait_until(lambda: adapter.open_connections() == 0)
    outcome = answer_of(processor.run, "k", adapter.add, 1)
    assert_true(adapter, outcome, before=11, after=12)
    now = adapter.get("k")
    assert now is not None
    assert processor.run("k", adapter.add, 1) == now + 1
    assert_as_good_as_new(adapter)


@over(lambda case: case.has_pool)
def test_connections_that_are_ended_between_load_and_save_lose_nothing_untold(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    with paused(adapter, processor) as caller:
        adapter.terminate()
        wait_until(lambda: adapter.open_connections() == 0)
    outcome = caller.get()
    assert_true(adapter, outcome, before=10, after=11)
    assert not isinstance(outcome, BatchError) or outcome.retry_safe  # nothing had been sent to commit
    assert_as_good_as_new(adapter)


@over(lambda case: case.has_proxy)
def test_a_load_that_cannot_connect_fails_with_the_drivers_error(
    case: Case, adapter: Adapter, processor: Processor[Any]
) -> None:
    proxy = proxy_of(adapter)
    proxy.refusing = True
    proxy.cut_all()
    most = 2 if case.name.startswith("sql-psycopg-") else 30  # the pool of psycopg 3 goes on trying for most of it
    with adapter.processor(max_duration=most) as impatient:
        outcome = answer_of(impatient.run, "k", adapter.add, 1)
    proxy.refusing = False
    assert isinstance(outcome, LoadFailed)
    assert outcome.retry_safe
    kinds = {kind.__module__.partition(".")[0] for kind in type(outcome.__cause__).__mro__}
    assert not kinds.isdisjoint(case.name.split("-"))
    assert_true(adapter, outcome, before=10, after=11)
    assert processor.run("k", adapter.add, 1) == 11


@over(lambda case: case.can_restart and "load" in case.slow_steps)
def test_the_next_batch_works_after_the_server_was_restarted_in_the_middle_of_a_load(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    with adapter.slow("load") as reached:
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(reached)
        adapter.restart()
    outcome = caller.get()
    assert_true(adapter, outcome, before=10, after=11)
    assert not isinstance(outcome, BatchError) or outcome.retry_safe
    now = adapter.get("k")
    assert now is not None
    assert processor.run("k", adapter.add, 1) == now + 1
    assert_as_good_as_new(adapter)


# -- what became of a COMMIT ------------------------------------------------------------------------------------


@over(lambda case: case.can_restart and case.has_proxy and "commit" in case.slow_steps)
def test_a_commit_that_a_crash_has_swallowed_is_not_taken_for_one_of_somebody_else(
    adapter: Adapter, processor: Processor[Any]
) -> None:
    adapter.flush()
    with adapter.slow("commit") as reached:
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(reached)
        adapter.crash()
        for total in range(10):  # PostgreSQL gives transactions the numbers again that a crash has taken back
            adapter.put("other", total)
    assert_true(adapter, caller.get(), before=10, after=11)


@over(lambda case: case.has_proxy)
def test_a_commit_whose_answer_is_lost_is_never_told_to_be_safe_to_run_again(
    case: Case, adapter: Adapter, processor: Processor[Any]
) -> None:
    rule = proxy_of(adapter).cut_after(adapter.commit_marker, adapter.commit_answer)
    outcome = answer_of(processor.run, "k", adapter.add, 1)
    assert rule.met == 1
    assert adapter.get("k") == 11
    if case.knows_outcome:
        assert outcome == 11
    else:
        assert isinstance(outcome, SaveFailed)
        assert not outcome.retry_safe
    assert processor.run("k", adapter.add, 1) == 12
    assert_as_good_as_new(adapter)


@over(lambda case: case.has_proxy)
def test_a_first_insert_whose_answer_is_lost_is_never_told_to_be_safe_to_run_again(
    case: Case, adapter: Adapter
) -> None:
    with adapter.processor(missing="make") as processor:
        proxy_of(adapter).cut_after(adapter.commit_marker, adapter.commit_answer)
        outcome = answer_of(processor.run, "k", adapter.add, 1)
    assert adapter.get("k") == 1
    if case.knows_outcome:
        assert outcome == 1
    else:
        assert isinstance(outcome, SaveFailed)
        assert not outcome.retry_safe


@over(lambda case: case.has_proxy)
def test_a_commit_that_never_arrives_is_not_told_to_be_saved(
    case: Case, adapter: Adapter, processor: Processor[Any]
) -> None:
    rule = proxy_of(adapter).cut_before(adapter.commit_marker)
    outcome = answer_of(processor.run, "k", adapter.add, 1)
    assert rule.met == 1
    assert_true(adapter, outcome, before=10, after=11)
    if case.knows_outcome:
        assert outcome == 11  # replayed
    assert_as_good_as_new(adapter)


@over(lambda case: case.has_proxy)
def test_whatever_message_is_cut_off_everybody_is_told_the_truth(case: Case, adapter: Adapter) -> None:
    dice = random.Random(case.name)
    proxy = proxy_of(adapter)
    adapter.put("k", 10)
    answers = []
    with adapter.processor(max_attempts=10) as processor:
        for _ in range(20):
            marker = dice.choice([ANY, adapter.commit_marker])
            _ = proxy.cut_before(marker) if dice.random() < 0.5 else proxy.cut_after(marker)
            answers += all_of([spawned(processor.run, "k", adapter.add, 1) for _ in range(dice.randint(1, 3))])
            proxy.forget_rules()
    saved = sum(not isinstance(answer, BatchError) for answer in answers)
    unknown = sum(isinstance(answer, BatchError) and not answer.retry_safe for answer in answers)
    total = adapter.get("k")
    assert total is not None
    assert saved <= total - 10 <= saved + unknown
    assert_as_good_as_new(adapter)


ANY = b""
"""The marker of whatever message is the next one."""
