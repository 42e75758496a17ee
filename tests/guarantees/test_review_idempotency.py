"""Idempotency keys where they were broken once: each comment says what was violated."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Flag
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

import gevent
import pytest
import sqlalchemy as sa
from django.db import OperationalError
from gevent import GreenletExit
from redis import RedisCluster
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlalchemy.pool import QueuePool

from geventbatch import BatchAborted, BatchError, BatchTimeout, Conflict, IdempotencyKeyReused, Processor
from geventbatch._idempotency import once
from geventbatch._idempotency.value_text import decode
from geventbatch.stores._sql import outcomes
from geventbatch.stores.django import _transaction
from geventbatch.stores.redis import RedisStore
from geventbatch.stores.sqlalchemy import SQLAlchemyStore, idempotency_table
from tests.guarantees.test_idempotency import Keeping, KeepingScope, answers, call, opened
from tests.guarantees.test_pace import LONGEST, Ticks
from tests.support import redis_server
from tests.support.adapters.base import cases
from tests.support.callers import answer_of
from tests.support.recording_store import Store, add, do_nothing, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from geventbatch.testing import VirtualTime
    from tests.support.adapters.base import Case


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    total: Mapped[int]


class Price(Base):
    __tablename__ = "prices"
    amount: Mapped[Decimal] = mapped_column(sa.Numeric(10, 2), primary_key=True)
    total: Mapped[int]


class Ticket(MappedAsDataclass, Base):
    __tablename__ = "tickets"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]


OUTCOMES: Final = idempotency_table("outcomes", Base.metadata)


class Rights(Flag):
    READ = 1
    WRITE = 2


@dataclass
class Half:
    number: int
    never_set: int = field(init=False)


class Unshowable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("it cannot be shown")


class Made(Exception):
    """Making one again takes as long as `on_made` says, as where its module has to be imported first."""

    on_made: Callable[[], object] = do_nothing

    def __new__(cls, *args: object) -> Self:
        cls.on_made()
        return super().__new__(cls, *args)


class Odd:
    """It has an answer of its own to any question for an attribute, as a LocalProxy outside of its context has."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} outside of a context")

    def __call__(self, resource: list[Any]) -> str:
        resource.append("odd")
        return "odd"


class OddAndFails(Odd):
    def __call__(self, resource: list[Any]) -> str:
        raise LookupError("odd")


@pytest.fixture
def store(clock: VirtualTime) -> Store:
    return Store(clock, "scope", load_time=0.01, save_time=0.02)


@pytest.fixture
def keeping(store: Store) -> Keeping:
    return Keeping(store)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'bank.sqlite'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def half(resource: list[Any]) -> Half:
    resource.append("half")
    return Half(1)


def rights(resource: list[Any]) -> tuple[Rights, Rights]:
    resource.append("rights")
    return Rights.READ | Rights.WRITE, Rights(0)


def unshowable(resource: list[Any]) -> None:
    raise Unshowable(object())


def refuse(resource: list[Any], number: int) -> None:
    raise Made(number)


def fail(resource: list[Any]) -> None:
    raise LookupError


def give_object(resource: list[Any]) -> object:
    return object()


def deposit(account: Account | Price, amount: int) -> int:
    account.total += amount
    return account.total


def itself(ticket: Ticket) -> Ticket:
    ticket.total += 1
    return ticket


# -- values and errors ------------------------------------------------------------------------------------------


def test_a_value_whose_encoding_fails_by_whatever_error_is_not_saved(keeping: Keeping, store: Store) -> None:
    # It was taken for a clean error of the operation: saved with the others, and not recorded. Sent again, it was
    # applied again.
    with opened(keeping) as processor:
        for _ in range(2):
            refused, other = answers([call(processor, "a", half), call(processor, None, add, 1)])
            assert other == 1
            assert "half" not in store.kept["k"]
            assert isinstance(refused, TypeError)


def test_a_flag_comes_back(keeping: Keeping, store: Store) -> None:
    # Its name, "READ|WRITE", is not that of a member: it was saved, and who came again got a BatchError.
    with opened(keeping) as processor:
        for _ in range(2):
            assert answers([call(processor, "a", rights)]) == [(Rights.READ | Rights.WRITE, Rights(0))]
    assert store.kept["k"] == ["rights"]


def test_a_dataclass_that_cannot_be_made_again_is_refused_at_first(engine: sa.Engine) -> None:
    # A mapped dataclass was recorded, and who came again got a BatchError.
    with engine.begin() as connection:
        connection.execute(sa.insert(Ticket).values(id=1, total=0))
    mapped = SQLAlchemyStore.mapped(engine, Ticket, idempotency=OUTCOMES)
    with Processor(open_resource=mapped, min_duration=0) as processor:
        assert isinstance(answer_of(processor.run, 1, itself, idempotency_key="a"), TypeError)


def test_an_error_that_cannot_be_shown_or_recorded_is_the_cause_of_what_its_own_caller_gets(keeping: Keeping) -> None:
    # What its __repr__ raised reached the caller in its place (guarantee 2).
    with opened(keeping) as processor:
        for _ in range(2):
            (error,) = answers([call(processor, "a", unshowable)])
            assert isinstance(error, TypeError)
            assert type(error.__cause__) is Unshowable


@pytest.mark.parametrize("start_timeout", [None, 3])
@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("operation", [give_object, fail, unshowable])
def test_no_error_leads_to_the_batch(
    keeping: Keeping, operation: Any, batching: bool, start_timeout: float | None
) -> None:
    # A frame of `Once` was in its traceback, or in that of its cause: a cycle, and the operations and the outcomes of
    # other callers for a log that shows the variables of frames.
    for clean in ((), (Exception,)):
        with opened(keeping, batching=batching, clean_errors=clean) as processor:
            for _ in range(2):
                error = answer_of(processor.run, "k", operation, idempotency_key="a", start_timeout=start_timeout)
                assert isinstance(error, Exception)
                assert not [frame for frame in frames_of(error) if frame == "geventbatch._idempotency.once"]


def frames_of(error: BaseException | None) -> list[str]:
    """The modules of all frames that are held by an error and by its causes."""
    found = []
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            found.append(trace.tb_frame.f_globals["__name__"])
            trace = trace.tb_next
        error = error.__cause__
    return found


# -- operations -------------------------------------------------------------------------------------------------


@dataclass
class Deposit:
    amount: int

    def __call__(self, resource: list[Any]) -> int:
        resource.append(self.amount)
        return self.amount


class Bound(partial[Any]):
    pass


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (methodcaller("append", 1), methodcaller("append", 2)),
        (Deposit(1), Deposit(2)),
        (Bound(add, mark=1), Bound(add, mark=2)),
    ],
    ids=["methodcaller", "dataclass", "subclass of partial"],
)
def test_callable_objects_that_differ_are_told_apart_or_refused(keeping: Keeping, first: Any, second: Any) -> None:
    # They had the name of their class: the second one was not applied, and its caller got the outcome of the first.
    with opened(keeping) as processor:
        before, after = (answers([call(processor, "a", operation)])[0] for operation in (first, second))
    if not isinstance(before, TypeError):
        assert isinstance(after, IdempotencyKeyReused)


# -- others of the batch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Odd, OddAndFails])
def test_an_operation_that_has_no_key_is_not_asked_for_attributes(keeping: Keeping, kind: type[Odd]) -> None:
    # What asking raised ended the batch, for all.
    with opened(keeping) as processor:
        assert answers([call(processor, "a", add, 1)]) == [1]
        callers = [call(processor, "a", add, 1), call(processor, None, kind()), call(processor, None, add, 2)]
        first, odd, last = answers(callers)
    assert (first, last) == (1, 2)
    assert odd == "odd" or isinstance(odd, LookupError)


def test_a_conflict_while_the_store_is_asked_is_replayed(
    keeping: Keeping, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was a LoadFailed for the whole batch and for those behind it, in place of a replay (guarantee 17).
    ask = KeepingScope.recorded
    conflicts = [Conflict("a deadlock")]

    def recorded(self: KeepingScope, keys: list[str]) -> dict[str, str]:
        if conflicts:
            raise conflicts.pop()
        return ask(self, keys)

    monkeypatch.setattr(KeepingScope, "recorded", recorded)
    with opened(keeping, clean_errors=()) as processor:
        broken, other = answers([call(processor, "a", fail), call(processor, None, add, 1)])
    assert isinstance(broken, LookupError)
    assert other == 1
    assert [keys for _, what, keys in store.log if what == "ask"] == [("a",)]


def test_the_deadline_while_outcomes_are_read_leaves_nobody_without_one(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The outcome of the one that was being read was, after that, what it had in the attempt that was not saved; or
    # there was none, and its caller got an AttributeError. Nothing was written, and they were told that nobody knows.
    with opened(keeping) as processor:
        assert [type(answers([call(processor, f"{n}", refuse, n)])[0]) for n in range(3)] == [Made] * 3

    def wait_next() -> None:
        wait(seconds.pop(0) if seconds else 0.0)

    # Behind the three that the operations make, each of which is tried out, and the first that is read.
    seconds = [0.0] * 7 + [2.0]
    with opened(keeping, max_duration=1) as processor:
        monkeypatch.setattr(Made, "on_made", wait_next)
        first, second, third, other = answers(
            [call(processor, f"{n}", refuse, n) for n in range(3)] + [call(processor, None, add, 1)]
        )
    assert (type(first), first.args) == (Made, (0,))
    for error in (second, third, other):
        assert isinstance(error, BatchTimeout)
        assert error.retry_safe


@pytest.mark.parametrize("kind", [GreenletExit, gevent.Timeout])
def test_a_kill_while_outcomes_are_read_leaves_nobody_without_one(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def make() -> None:
        made.append(None)
        if len(made) == 8:
            raise kind

    made: list[None] = []
    with opened(keeping) as processor:
        assert [type(answers([call(processor, f"{n}", refuse, n)])[0]) for n in range(3)] == [Made] * 3
        monkeypatch.setattr(Made, "on_made", make)
        first, second, third, other = answers(
            [call(processor, f"{n}", refuse, n) for n in range(3)] + [call(processor, None, add, 1)]
        )
    assert (type(first), first.args) == (Made, (0,))
    for error in (second, third, other):
        assert isinstance(error, BatchAborted)
        assert error.retry_safe


def test_a_thousand_outcomes_that_are_read_never_hold_the_hub_for_long(
    keeping: Keeping, clock: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They were all read in one piece (guarantee 10).
    def slowly(told: str) -> Any:
        clock.spend(0.0001)
        return decode(told)

    with opened(keeping, min_duration=1, max_duration=5) as processor:
        sent = [call(processor, f"{n}", add, n) for n in range(1000)]
        assert answers(sent) == list(range(1000))
        monkeypatch.setattr(once, "decode", slowly)
        with Ticks(clock) as ticks:
            assert answers([call(processor, f"{n}", add, n) for n in range(1000)]) == list(range(1000))
    assert ticks.longest_gap() < LONGEST


# -- names ------------------------------------------------------------------------------------------------------


def test_stores_of_one_table_by_other_columns_have_nothing_to_do_with_each_other(engine: sa.Engine) -> None:
    # Key 1 by id and key 1 by number are two accounts: the second one got the outcome of the first one's.
    with engine.begin() as connection:
        connection.execute(
            sa.insert(Account), [{"id": 1, "number": 2, "total": 10}, {"id": 2, "number": 1, "total": 20}]
        )
    for by, total in ((None, 11), ("number", 21), ("id", 11)):
        mapped = SQLAlchemyStore.mapped(engine, Account, by=by, idempotency=OUTCOMES)
        with Processor(open_resource=mapped, min_duration=0) as processor:
            assert processor.run(1, deposit, 1, idempotency_key="a") == total


def test_keys_that_are_equal_have_the_same_outcomes(engine: sa.Engine) -> None:
    # 1.50 and 1.5 are one key and one row; sent again under the other one, the operation was applied again.
    with engine.begin() as connection:
        connection.execute(sa.insert(Price).values(amount=Decimal("1.50"), total=0))
    mapped = SQLAlchemyStore.mapped(engine, Price, idempotency=OUTCOMES)
    with Processor(open_resource=mapped, min_duration=0) as processor:
        assert [processor.run(key, deposit, 1, idempotency_key="a") for key in ("1.50", "1.5", Decimal(15) / 10)] == [
            1
        ] * 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Decimal("1.50"), Decimal("1.5")),
        (Decimal(100), Decimal("1E+2")),
        (Decimal("-0"), Decimal(0)),
        (datetime(2026, 7, 1, 12, tzinfo=UTC), datetime(2026, 7, 1, 14, tzinfo=timezone(timedelta(hours=2)))),
        ((1, Decimal("1.0")), (1, Decimal(1))),
    ],
)
def test_keys_that_are_equal_have_one_name(first: Any, second: Any) -> None:
    table = outcomes.OutcomeTable("outcomes", "sqlite", 1.0)
    assert first == second
    assert outcomes.Outcomes(table, "s", first).prefix == outcomes.Outcomes(table, "s", second).prefix
    assert outcomes.Outcomes(table, "s", first).prefix != outcomes.Outcomes(table, "s", str(first)).prefix


def test_the_outcomes_are_in_the_schema_that_the_engine_translates_to(tmp_path: Path) -> None:
    # The statements of the table of outcomes knew nothing of it: one tenant got the outcomes of another one.
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'main.sqlite'}", poolclass=QueuePool)

    @sa.event.listens_for(engine, "connect")
    def attach(connection: Any, _: object) -> None:
        for name in "ab":
            connection.execute(f"ATTACH '{tmp_path / name}' AS {name}")

    for name, start in (("a", 0), ("b", 10)):
        store = SQLAlchemyStore.documents(
            engine.execution_options(schema_translate_map={None: name}),
            "documents",
            missing=partial(made_at, start),
            idempotency=idempotency_table("outcomes"),
        )
        store.create_table()
        with Processor(open_resource=store, min_duration=0) as processor:
            assert [processor.run("k", count, idempotency_key="a") for _ in range(2)] == [start + 1] * 2
            assert store.purge_outcomes() == 0
    engine.dispose()


def made_at(start: int, key: str) -> list[int]:
    return [start]


def count(resource: list[int]) -> int:
    resource[0] += 1
    return resource[0]


# -- expiry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=case.marks) for case in cases() if case.has_rows and case.has_outcomes],
)
def test_an_expired_outcome_that_somebody_else_deletes_meanwhile_is_in_nobodys_way(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The caller got the IntegrityError of the table of outcomes, as if its operation had violated a constraint: with a
    # purge at that moment, or when two processes were given the key at once.
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        store: Any = adapter.store()
        find = outcomes.Outcomes.find

        def purged_before(self: outcomes.Outcomes, send: Any, keys: Any) -> dict[str, str]:
            store.purge_outcomes()
            return find(self, send, keys)

        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11
            adapter.expire_outcomes()
            monkeypatch.setattr(outcomes.Outcomes, "find", purged_before)
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=case.marks) for case in cases() if case.has_rows and case.has_outcomes],
)
def test_who_cannot_look_what_is_recorded_has_certainly_not_saved(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The insert was refused, and so nothing is saved; what looking raised, a deadlock of MariaDB's for one, was a
    # SaveFailed that said that nobody knows.
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11

            def fails(self: outcomes.Outcomes, send: Any, keys: Any) -> dict[str, str]:
                return dict(send("SELECT nothing", ()).fetchall())

            with monkeypatch.context() as patch:
                patch.setattr(outcomes.Outcomes, "find", fails)
                error = answer_of(processor.run, "k", adapter.add, 1, idempotency_key="a")
            assert isinstance(error, BatchError)
            assert error.retry_safe
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in cases() if "sqlite" in case.name and case.has_outcomes]
)
def test_an_expired_outcome_is_deleted_in_gevents_way_while_another_process_writes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver waited for the other one, five seconds, and held the hub.
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        adapter.put("other", 0)
        find = outcomes.Outcomes.find
        others: list[gevent.Greenlet[..., None]] = []

        def write() -> None:
            with adapter.holding("other", 1):
                gevent.sleep(0.1)

        def while_another_writes(self: outcomes.Outcomes, send: Any, keys: Any) -> dict[str, str]:
            others.append(gevent.spawn(write))
            gevent.sleep(0.02)
            return find(self, send, keys)

        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11
            adapter.expire_outcomes()
            monkeypatch.setattr(outcomes.Outcomes, "find", while_another_writes)
            begun = time.monotonic()
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12
            assert time.monotonic() - begun < 3
        (other,) = others
        other.get()
        assert adapter.get("other") == 1


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name) for case in cases() if case.name == "django-row-sqlite"]
)
def test_a_deletion_of_expired_outcomes_that_cannot_be_committed_leaves_nothing_unknown(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing of the batch was in that COMMIT; but its callers were told that nobody knows.
    def fails(self: Any) -> None:
        raise OperationalError("disk I/O error")

    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 10)
        with adapter.processor() as processor:
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 11
            adapter.expire_outcomes()
            with monkeypatch.context() as patch:
                patch.setattr(_transaction.Transaction, "commit", fails)
                error = answer_of(processor.run, "k", adapter.add, 1, idempotency_key="a")
            assert isinstance(error, BatchError)
            assert error.retry_safe
            assert processor.run("k", adapter.add, 1, idempotency_key="a") == 12


def test_a_key_beside_which_a_cluster_can_keep_nothing_is_refused_with_an_idempotency_key_only() -> None:
    # It failed at the save, for everybody in the batch.
    client = RedisCluster.from_url(redis_server.cluster_url())
    store = RedisStore(client, prefix=f"{uuid4().hex}:", missing=lambda _: [0])
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        for key in ("a}b", "x{}y", "}"):
            error = answer_of(processor.run, key, count, idempotency_key="a")
            assert isinstance(error, ValueError)
            assert "nothing was run" in str(error)
            assert processor.run(key, count) == 1
        assert [processor.run("{a}b}", count, idempotency_key="a") for _ in range(2)] == [1, 1]
