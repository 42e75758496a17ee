"""What outlives a release stays byte for byte: records, and the names by which others find us.

The rest of it is in test_keys (which worker a key has), test_redis_truth (names of outcomes in Redis),
test_recorded_outcomes (what earlier releases have recorded), test_errors and test_report (what operators look for).
"""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gevent
import pytest
import sqlalchemy as sa
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import Conflict, Processor, errors, stores
from geventbatch._idempotency.error_text import decode_error, encode_error
from geventbatch._idempotency.once import Once
from geventbatch._idempotency.value_text import decode, describe, encode, path_of
from geventbatch.integrations import opentelemetry
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore
from geventbatch.stores.redis._save import State
from geventbatch.stores.sqlalchemy import KeyText, OutcomeId, StateText, idempotency_table
from tests.support.callers import answer_of
from tests.support.django_project.start import database
from tests.support.plain import VALUES, Ticket, Train, anything, closing_over
from tests.support.redis_server import connected, redis_url
from tests.watching.test_prometheus import watched

from django.apps import apps  # isort: skip - after Django is set up
from django.core.exceptions import ValidationError  # isort: skip - likewise
from tests.support.django_project.bank.models import Account, Outcome  # isort: skip - likewise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from geventbatch.testing import VirtualTime


def nothing(*args: object) -> None:
    """An operation."""


def book(resource: dict[str, int]) -> Ticket:
    resource["sold"] = 1
    return Ticket(12, "Ann")


def deposit(account: Any) -> int:
    account.balance += 1
    return int(account.balance)


# -- records: values and errors ---------------------------------------------------------------------------------


def test_values_are_recorded_as_they_always_were() -> None:
    told = [
        "null",
        "true",
        "0",
        "-1000000000000000000000000000000",
        "1.5",
        "Infinity",
        '""',
        r'"Gr\u00fc\u00dfe \"you\" \n \ud800"',
        '{"~bytes":"AP8="}',
        '{"~decimal":"1.10"}',
        '{"~date":"2026-01-02"}',
        '{"~datetime":"2026-01-02T03:04:05.000006"}',
        '{"~datetime":"2026-01-02T00:00:00+00:00"}',
        '{"~time":"01:02:03"}',
        '{"~timedelta":[-1,0,3]}',
        '{"~uuid":"00000000-0000-0000-0000-000000000005"}',
        '{"~enum":["tests.support.plain:Class","FIRST"]}',
        '{"~enum":["tests.support.plain:Number","ONE"]}',
        '{"~dataclass":["tests.support.plain:Ticket",{"seat":12,"passenger":"Ann"}]}',
        "[]",
        '{"~tuple":[]}',
        '[1,{"~tuple":[2,[{"~decimal":"3"}]]},{"a":{"~tuple":[1]}}]',
        '{"~dict":[["~tuple",[1]]]}',
        '{"~dict":[[1,"a"],[{"~tuple":[1,2]},"b"],[null,"c"]]}',
        '{"b":1,"a":2}',
    ]
    values = VALUES[: len(told)]
    assert [encode(value) for value in values] == told
    assert [repr(decode(text)) for text in told] == list(map(repr, values))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("a", 1), '["builtins:KeyError",{"~tuple":["a",1]},{}]'),
        (Conflict("changed"), '["geventbatch.errors:Conflict",{"~tuple":["changed"]},{}]'),
        (
            OSError(2, "none", "a.txt"),
            '["builtins:FileNotFoundError",{"~tuple":[2,"none"]},{},{"filename":"a.txt"}]',
        ),
        (
            ValidationError("short", "min", {"n": 3}),
            '["django.core.exceptions:ValidationError",["one",["short","min",{"n":3}]],{}]',
        ),
        (
            ValidationError(["a", ValidationError("b", "c")]),
            '["django.core.exceptions:ValidationError",["list",[["a",null,null],["b","c",null]]],{}]',
        ),
        (
            ValidationError({"name": ["a"]}),
            '["django.core.exceptions:ValidationError",["dict",[["name",[["a",null,null]]]]],{}]',
        ),
    ],
    ids=repr,
)
def test_an_error_is_recorded_as_it_always_was(error: Exception, told: str) -> None:
    assert encode_error(error, (Exception,)) == told
    made = decode_error(told, (type(error),))
    assert (type(made), repr(made)) == (type(error), repr(error))


# -- records: what tells an operation, and a resource, from others --------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "args", "told"),
    [
        (anything, (1, "1", True, None), 'tests.support.recording_store:add(1,"1",true,null)'),
        (anything, ((1, [2]),), 'tests.support.recording_store:add({"~tuple":[1,[2]]})'),
        (anything, ({"b": 2, "a": 1},), 'tests.support.recording_store:add({"a":1,"b":2})'),
        (anything, ({"1": 2, 1: 2},), 'tests.support.recording_store:add({"~dict":[["1",2],[1,2]]})'),
        (
            anything,
            (anything, Train),
            'tests.support.recording_store:add(tests.support.recording_store:add,{"~callable":"tests.support.plain:Train"})',
        ),
        (
            anything,
            (Ticket(1, "Ann"),),
            'tests.support.recording_store:add({"~dataclass":["tests.support.plain:Ticket",{"passenger":"Ann","seat":1}]})',
        ),
        (Train.book, (12,), "tests.support.plain:Train.book(12)"),
        (Train().book, (12,), "tests.support.plain:Train.book of tests.support.plain:Train(12)"),
        (Train.open, (), "tests.support.plain:Train.open of tests.support.plain:Train()"),
        (partial(anything, 1, mark=2), (3,), 'tests.support.recording_store:add[1,{"mark":2}](3)'),
        (Ticket(1, "Ann"), (), 'a {"~dataclass":["tests.support.plain:Ticket",{"passenger":"Ann","seat":1}]}()'),
        (
            closing_over(1),
            (),
            'tests.support.plain:closing_over.<locals>.operation[["defaults",{"~tuple":[]}],["keywords",{}],["value",1]]()',
        ),
    ],
    ids=str,
)
def test_an_operation_is_described_as_it_always_was(operation: Any, args: tuple[Any, ...], told: str) -> None:
    assert describe(operation, args) == told


@pytest.mark.parametrize(
    ("asked", "fingerprint"),
    [
        ((Train.book, (12, "Ann")), "fc4be42c1e17750c7b57e45e"),
        ((partial(Train.book, seat=12), (Ticket(1, "Zürich \ud800"),)), "93f947554a3aacfd168c9e26"),
        ((Train.book, (12, "Ann"), ("sent again", 1)), "6dd8d77f07077d9877059fa3"),
        ((closing_over(1), (), ("sent again", 1)), "6db38bdb7172ef25a8e9d264"),
    ],
    ids=["plain", "partial", "identified by", "identified by, alone"],
)
def test_a_fingerprint_is_what_it_always_was(asked: tuple[Any, ...], fingerprint: str) -> None:
    assert Once("a-key", *asked).fingerprint == fingerprint


class Base(DeclarativeBase):
    pass


class Purse(Base):
    __tablename__ = "frozen_purses"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


OUTCOMES = idempotency_table("frozen_outcomes", Base.metadata)


def test_a_row_of_outcomes_has_the_id_and_the_text_that_it_always_had(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'frozen.sqlite'}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Purse), [{"id": 7, "balance": 0}])
    mapped = SQLAlchemyStore.mapped(engine, Purse, idempotency=OUTCOMES)
    trains = SQLAlchemyStore.documents(engine, "frozen_trains", missing=lambda _: {}, idempotency=OUTCOMES)
    trains.create_table()
    try:
        with Processor(open_resource=mapped, min_duration=0) as purses:
            purses.run(7, deposit, idempotency_key="first")
        with Processor(open_resource=trains, min_duration=0) as processor:
            processor.run("ICE 1", book, idempotency_key="second")
        with engine.connect() as connection:
            found = {row[0]: row[1] for row in connection.execute(sa.select(OUTCOMES.c.id, OUTCOMES.c.outcome))}
    finally:
        engine.dispose()
    assert found == {
        "49d11b20586b5cdf820aff3307fea5be:first": "90eab1703bddb36c70aebcc2=1",
        "a4d933a325d9703e7bb38231a704141f:second": (
            '652fb50cd768d2ba2051ae2f={"~dataclass":["tests.support.plain:Ticket",{"seat":12,"passenger":"Ann"}]}'
        ),
    }


def test_a_row_of_outcomes_of_django_s_has_the_id_and_the_text_that_it_always_had(tmp_path: Path) -> None:
    with database(f"sqlite:///{tmp_path / 'frozen.sqlite'}") as alias:
        Account.objects.using(alias).create(id=7, name="Ann")
        store = DjangoStore(Account, using=alias, idempotency=Outcome)
        with Processor(open_resource=store, min_duration=0) as accounts:
            accounts.run(7, deposit, idempotency_key="first")
        found = dict(Outcome.objects.using(alias).values_list("id", "outcome"))
    assert found == {"eeec5525b5c37833cf8839260a29c671:first": "90eab1703bddb36c70aebcc2=1"}


def test_a_resource_in_redis_and_its_outcome_look_as_they_always_did() -> None:
    prefix = f"{uuid4()}:"
    with connected(redis_url()) as client:
        store: RedisStore[dict[str, int]] = RedisStore(client, prefix=prefix, missing=lambda _: {})
        with Processor(open_resource=store, min_duration=0) as processor:
            processor.run("ICE 1", book, idempotency_key="a-key")
        found = client.hgetall(f"{prefix}ICE 1")
        token = found.pop(b"saves")
        assert found == {b"value": b'{"sold":1}', b"version": b"1"}
        assert re.fullmatch(rb"1:[0-9a-f]{16}", token)
        outcome = client.get(f"{{{prefix}ICE 1}}:idempotency:a-key")
        client.delete(f"{prefix}ICE 1", f"{{{prefix}ICE 1}}:idempotency:a-key")
    assert (
        outcome
        == b'652fb50cd768d2ba2051ae2f={"~dataclass":["tests.support.plain:Ticket",{"seat":12,"passenger":"Ann"}]}'
    )


def test_a_hash_in_redis_remembers_its_last_saves_and_fences_as_it_always_did() -> None:
    saves = b" ".join(b"%d:0f" % version for version in range(2, 10))
    state = State(b"{}", b"9", saves)
    assert state.followed_by("!1e") == (10, b"3:0f 4:0f 5:0f 6:0f 7:0f 8:0f 9:0f 10!1e")
    assert State(None, b"", b"").followed_by(":1e") == (1, b"1:1e")


# -- names: metrics -----------------------------------------------------------------------------------------------

LABELS = {
    "batch_operations": ["processor"],
    "batch_wait_seconds": ["processor"],
    "batch_load_seconds": ["processor"],
    "batch_apply_seconds": ["processor"],
    "batch_save_seconds": ["processor"],
    "batch_seconds": ["processor"],
    "operations_total": ["outcome", "processor"],
    "failed_batches_total": ["error", "phase", "processor"],
    "conflicts_total": ["processor"],
    "undone_total": ["processor"],
    "undo_seconds_total": ["processor"],
    "live_batches": ["processor"],
    "overdue_batches": ["processor"],
    "waiting_operations": ["processor"],
    "workers": ["processor"],
    "max_duration_seconds": ["processor"],
}
OUTCOME_NAMES = {"returned", "raised", "failed", "unknown", "withdrawn", "refused"}


@pytest.fixture
def failed(no_other_processors: None, clock: VirtualTime) -> Iterator[Callable[[], None]]:
    """Gives what has a batch fail."""

    def load(key: str) -> None:
        raise OSError

    with Processor(load_resource=load, min_duration=0, name="trains") as processor:

        def fail() -> None:
            answer_of(processor.run, "k", nothing)
            clock.settle()

        yield fail


def test_metrics_of_prometheus_have_the_names_and_labels_that_they_always_had(failed: Callable[[], None]) -> None:
    with watched(CollectorRegistry()) as registry:
        failed()
        found: dict[str, list[str]] = {}
        outcomes, failures = set(), set()
        for family in registry.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name.removeprefix("geventbatch_")] = sorted(labels)
            outcomes |= {sample.labels["outcome"] for sample in family.samples if "outcome" in sample.labels}
            failures |= {(one.labels["phase"], one.labels["error"]) for one in family.samples if "phase" in one.labels}
    assert found == LABELS
    assert outcomes == OUTCOME_NAMES
    assert failures == {("load", "LoadFailed")}


def test_metrics_of_opentelemetry_have_the_names_and_labels_that_they_always_had(failed: Callable[[], None]) -> None:
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader])
    opentelemetry.instrument(meter_provider=meters)
    try:
        failed()
        data: Any = reader.get_metrics_data()
    finally:
        opentelemetry.uninstrument()
        opentelemetry._instruments.clear()
        meters.shutdown()
    metrics = [metric for one in data.resource_metrics for scope in one.scope_metrics for metric in scope.metrics]
    found = {
        metric.name.removeprefix("geventbatch_"): sorted(
            {name for one in metric.data.data_points for name in one.attributes}
        )
        for metric in metrics
    }
    points = [point.attributes for metric in metrics for point in metric.data.data_points]
    assert found == LABELS
    assert {point["outcome"] for point in points if "outcome" in point} == OUTCOME_NAMES
    assert {(one["phase"], one["error"]) for one in points if "phase" in one} == {("load", "LoadFailed")}


# -- names: log lines ---------------------------------------------------------------------------------------------


def test_log_lines_begin_as_they_always_did(clock: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    def add_and_raise(resource: list[int]) -> None:
        resource.append(1)
        raise KeyError

    def copy(resource: list[int]) -> list[int]:
        clock.spend(0.25)
        return list(resource)

    def cannot(resource: list[int]) -> None:
        raise TypeError("it has a lock")

    def block(resource: list[int]) -> None:
        clock.spend(0.25)

    for operation, how in ((add_and_raise, copy), (add_and_raise, cannot), (block, None)):
        with Processor(
            load_resource=lambda _: [0], save_resource=nothing, min_duration=0, name="trains", copy_resource=how
        ) as processor:
            gevent.joinall([gevent.spawn(answer_of, processor.run, "ICE 1", operation) for _ in range(2)])
        clock.settle()
    lines = [one.getMessage().replace(add_and_raise.__qualname__, "book") for one in caplog.records]
    where = f"{block.__qualname__} ({__file__}:{block.__code__.co_firstlineno})"
    began = [
        "operation, book (",
        "undoing 3 operations that raised took 750 ms of its 750 ms, most of it for book, which raised KeyError. ",
        "what book had changed by the time that it raised KeyError cannot be undone in memory (TypeError('it has",
        f"operation, {where}, kept the hub for 0.250 s without a yield: no other greenlet of this process could run. ",
    ]
    for line, beginning in zip(lines, began, strict=True):
        assert line.startswith(f"trains: batch of key 'ICE 1': {beginning}")
    assert {(one.name, one.levelname) for one in caplog.records} == {("geventbatch", "WARNING")}


# -- names: paths ---------------------------------------------------------------------------------------------------


PATHS = {
    "geventbatch.errors": """
        BatchAborted BatchError BatchTimeout CannotUndo Conflict IdempotencyKeyReused LoadFailed NotSaved NothingToSave
        OperationCancelled PartlySaved ProcessorOverloaded ProcessorStopped Rejected Repeated ResourceMissing SaveFailed
    """,
    "geventbatch.scopes": """
        Admits AfterSave ChecksOutcomes Copies Deletes HearsStop JudgesErrors JudgesReturns KeepsOutcomes MustCompare
        NormalizesKeys OnServer Owns Records Reuses StepByStep TakesRows Undoes
    """,
    "geventbatch.stores": "DjangoStore RedisStore Reuse SQLAlchemyStore as_not_saved",
    "geventbatch.stores.sqlalchemy": "KeyText OutcomeId SQLAlchemyStore StateText idempotency_table",
    "geventbatch.stores._documents": "KeyText StateText",  # in migrations
    "geventbatch.stores._sqlalchemy_outcomes": "OutcomeId",  # likewise
    "geventbatch.stores.django": "DjangoStore",
    "geventbatch.stores.redis": "RedisStore",
    "geventbatch.integrations.celery": "stop",
    "geventbatch.integrations.django": "processors stop_all",
    "geventbatch.integrations.django.apps": "GeventbatchConfig",
    "geventbatch.integrations.django.middleware": "Answer ErrorAnswers",
    "geventbatch.integrations.django.models": "OutcomeIdField OutcomeModel",
    "geventbatch.integrations.dramatiq": "Stop",
    "geventbatch.integrations.flask": "Answer AppProcessor GeventBatch answer_to",
    "geventbatch.integrations.huey": "consume",
    "geventbatch.integrations.opentelemetry": "instrument uninstrument",
    "geventbatch.integrations.page": "Page",
    "geventbatch.integrations.prometheus": "watch",
    "geventbatch.integrations.pywsgi": "serve",
    "geventbatch.integrations.uwsgi": "stop",
    "geventbatch.integrations.wsgi": "Answer ErrorAnswers",
    "geventbatch.testing": """
        Fault FaultPlan ImpureOperation VirtualTime batching_off check_operations faults joined_engine state_of
        virtual_time
    """,
}


@pytest.mark.parametrize("module", PATHS)
def test_what_others_import_is_where_it_always_was(module: str) -> None:
    found = import_module(module)
    assert [name for name in PATHS[module].split() if not hasattr(found, name)] == []


def test_an_error_is_recorded_and_pickled_by_the_path_of_its_class() -> None:
    for name in PATHS["geventbatch.errors"].split():
        assert path_of(getattr(errors, name)) == f"geventbatch.errors:{name}"


def test_migrations_name_the_types_of_columns_by_a_path_that_stays() -> None:
    types = (KeyText, StateText, OutcomeId)
    assert {one.__module__ for one in types} == {"geventbatch.stores.sqlalchemy"}
    # As a migration of an earlier release does, which has imported the package of the stores at most.
    found: Any = stores
    assert found._documents.KeyText is KeyText
    assert found._documents.StateText is StateText
    assert found._sqlalchemy_outcomes.OutcomeId is OutcomeId


def test_the_app_of_django_is_known_by_the_path_and_the_label_that_it_always_had() -> None:
    assert apps.get_app_config("geventbatch").name == "geventbatch.integrations.django"
