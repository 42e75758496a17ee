"""Functions that cannot work are refused as they are passed, or else at the first load, by the option's name."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import redis
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, sessionmaker

from geventbatch import LoadFailed, Processor, SaveFailed
from geventbatch.integrations.flask import GeventBatch
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from geventbatch.testing import VirtualTime


def load(key: object) -> list[int]:
    return []


def load_nothing() -> list[int]:
    return []


def save(key: object, resource: object) -> None: ...


def save_one(resource: object) -> None: ...


def save_three(key: object, resource: object, session: object) -> None: ...


async def save_later(key: object, resource: object) -> None: ...


def save_by_steps(key: object, resource: object) -> Iterator[None]:
    yield


def open_by_steps(key: object) -> Iterator[list[int]]:
    yield []


async def open_later(key: object) -> list[int]:
    return []


async def open_by_steps_later(key: object) -> AsyncIterator[list[int]]:
    yield []


class Model:
    def __init__(self, key: object) -> None: ...


class SavesLater:
    async def __call__(self, key: object, resource: object) -> None: ...


store = SQLAlchemyStore.documents(sa.create_engine("sqlite://"), "trains")
URL = "postgresql://someone:secret@somewhere/trains"
LOOSE: Any = lambda value: value  # noqa: E731 - past the type checkers
PLAIN = "write a plain function"

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"load_resource": load_nothing}, "load_nothing (", "load_resource(key): too many positional arguments"),
    ({"load_resource": save}, "save (", "load_resource(key): missing a required argument: 'resource'"),
    ({"save_resource": save_one}, "save_one (", "save_resource(key, resource): too many positional arguments"),
    ({"save_resource": save_three}, "save_three (", "missing a required argument: 'session'"),
    ({"save_resource": save_later}, "save_later (", "an async function: its result would have to be awaited"),
    ({"save_resource": SavesLater()}, "SavesLater (", PLAIN),
    ({"save_resource": save_by_steps}, "save_by_steps (", PLAIN),
    ({"load_resource": open_by_steps}, "open_by_steps (", PLAIN),
    ({"load_resource": open_later}, "open_later (", PLAIN),
    ({"load_resource": store}, "<SQLAlchemyStore", "a store of one key at a time: pass it as open_resource"),
    ({"load_resource": URL}, "a URL ('postgresql://…')", "must be callable"),
    ({"open_resource": URL}, "a URL ('postgresql://…')", "SQLAlchemyStore.documents(engine, table)"),
    ({"open_resource": sa.create_engine("sqlite://")}, "Engine(sqlite://)", "SQLAlchemyStore.documents(engine, table)"),
    *[
        ({"open_resource": kind}, f"the class {kind.__name__}", "must be a store")
        for kind in (SQLAlchemyStore, DjangoStore)
    ],
    *[({"open_resource": kind}, f"the class {kind.__name__}", "must be a store") for kind in (RedisStore, Model)],
    (
        {"open_resource": SQLAlchemyStore.documents},
        "SQLAlchemyStore.documents (",
        "missing a required argument: 'table'",
    ),
    ({"open_resource": load_nothing}, "load_nothing (", "open_resource(key): too many positional arguments"),
    ({"open_resource": load_nothing}, "load_nothing (", "; it has to be a store, such as SQLAlchemyStore.documents("),
    ({"open_resource": contextmanager(load_nothing)}, "load_nothing (", "too many positional arguments"),  # type: ignore[arg-type]
    (
        {"open_resource": contextmanager(open_by_steps)(1)},
        "<contextlib._GeneratorContextManager",
        "pass the function itself",
    ),
    ({"open_resource": store("k")}, "<geventbatch.stores", "pass the function itself"),
    ({"open_resource": open_by_steps}, "open_by_steps (", "decorate it with contextlib.contextmanager"),
    ({"open_resource": open_later}, "open_later (", "an async function, but must return a context manager"),
    ({"open_resource": open_by_steps_later}, "open_by_steps_later (", "an async generator function"),
    (
        {"open_resources": store},
        "<SQLAlchemyStore",
        "one key at a time: pass its open_resources, or it as open_resource",
    ),
    ({"open_resources": open_by_steps}, "open_by_steps (", "decorate it with contextlib.contextmanager"),
    ({"open_resources": load_nothing}, "load_nothing (", "open_resources(keys): too many"),
    ({"load_resources": load_nothing, "save_resources": print}, "load_nothing (", "load_resources(keys): too many"),
    ({"load_resources": load, "save_resources": save}, "save (", "save_resources(resources): missing a required"),
    ({"load_resources": load, "save_resources": open_later}, "open_later (", PLAIN),
    ({"worker_number_for_key": load}, "load (", "worker_number_for_key(key, workers): too many positional arguments"),
]


@pytest.mark.parametrize(("options", "shown", "instead"), REFUSED, ids=str)
def test_what_cannot_work_is_refused_as_the_processor_is_made(
    options: dict[str, Any], shown: str, instead: str
) -> None:
    with pytest.raises(TypeError) as raised:
        Processor(**options)
    assert any(str(raised.value).startswith(f"{name} is {shown}") for name in options)
    assert instead in str(raised.value)
    assert "secret" not in str(raised.value)


def with_session(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args, "a session")

    return wrapper


class Meta(type):
    def __call__(cls, key: object) -> Any:
        return contextmanager(open_by_steps)(key)


class MadeByMeta(metaclass=Meta): ...


class Scope:
    def __init__(self, key: object) -> None: ...

    def __enter__(self) -> list[int]:
        return []

    def __exit__(self, *_: object) -> None: ...


class StandIn:
    def __init__(self, key: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(Scope(1), name)


ALLOWED: list[dict[str, Any]] = [
    {"load_resource": load, "save_resource": save},
    {"load_resource": load, "save_resource": with_session(save_three)},
    {"load_resource": load, "save_resource": partial(save_three, session=1)},
    {"load_resource": load, "save_resource": lambda *_: None},
    {"load_resource": {1: []}.__getitem__, "save_resource": {}.__setitem__},
    {"load_resource": Model, "save_resource": print},
    {"open_resource": contextmanager(open_by_steps)},
    *[{"open_resource": kind} for kind in (Scope, MadeByMeta, StandIn)],
]


@pytest.mark.parametrize("options", ALLOWED, ids=str)
def test_what_works_is_taken(options: dict[str, Any]) -> None:
    with Processor(min_duration=0, **options) as processor:
        assert processor.run(1, lambda _: 5) == 5


@asynccontextmanager
async def open_for_async_with(key: object) -> AsyncIterator[list[int]]:
    yield []


NO_SCOPES: list[tuple[Callable[..., Any], str]] = [
    (load, "open_resource returned [], which is no context manager"),
    (lambda key: None, "open_resource returned None, which is no context manager"),
    (open_for_async_with, "it is one for async with"),
    (lambda key: URL, "open_resource returned a URL ('postgresql://…'), which is no context manager"),
    (lambda key: store(key).__enter__, "which is no context manager"),
]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(("opener", "told"), NO_SCOPES, ids=[told for _, told in NO_SCOPES])
def test_what_gives_no_context_manager_fails_the_load_by_its_name(
    clock: VirtualTime, opener: Callable[..., Any], told: str, batching: bool
) -> None:
    app = Flask("trains")
    in_flask = GeventBatch(app)
    for open_resource in (True, False):
        name = "open_resource" if open_resource else "open_resources"
        options: dict[str, Any] = {name: opener, "min_duration": 0, "batching": batching}
        declared = in_flask.processor(**options)
        with Processor(**options) as processor, app.app_context():
            for run in (processor.run, declared.run):
                failed = answer_of(run, "k", len)
                assert type(failed) is LoadFailed
                assert type(failed.__cause__) is TypeError
                assert told.replace("open_resource", name) in str(failed.__cause__)
        declared.for_app(app).stop()


def test_a_scope_without_an_exit_fails_before_it_is_entered(clock: VirtualTime) -> None:
    entered = []

    class Half:
        def __enter__(self) -> None:
            entered.append(True)

    options: dict[str, Any] = {"open_resource": lambda key: Half()}
    with Processor(**options, min_duration=0) as processor:
        assert isinstance(answer_of(processor.run, "k", len), LoadFailed)
    assert not entered


def test_an_attribute_error_of_the_loads_own_is_told_as_it_is(clock: VirtualTime) -> None:
    class Broken(Scope):
        def __enter__(self) -> list[int]:
            raise AttributeError("its own")

    def broken(key: object) -> Any:
        raise AttributeError("its own")

    for opener in (Broken, broken):
        with Processor(open_resource=opener, min_duration=0) as processor:
            failed = answer_of(processor.run, "k", len)
        assert repr(failed.__cause__) == "AttributeError('its own')"


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("bad", [open_later, open_by_steps])
def test_a_load_or_save_that_only_gives_what_is_still_to_run_fails_by_its_name(
    clock: VirtualTime, bad: Callable[..., Any], many: bool
) -> None:
    names = ("load_resources", "save_resources") if many else ("load_resource", "save_resource")
    good: list[Callable[..., Any]] = [lambda keys: {key: [] for key in keys} if many else [], lambda *_: None]
    for number, kind in enumerate((LoadFailed, SaveFailed)):
        options: dict[str, Any] = dict(zip(names, good, strict=True))
        options[names[number]] = lambda *_: bad(1)
        with Processor(min_duration=0, **options) as processor:
            failed = answer_of(processor.run, "k", lambda _: None)
        assert type(failed) is kind
        assert type(failed.__cause__) is TypeError
        assert str(failed.__cause__).startswith(f"{names[number]} returned a ")
        assert PLAIN in str(failed.__cause__)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("give", [Future, lambda: gevent.spawn(load, 1)], ids=["future", "greenlet"])
def test_a_save_that_goes_on_behind_its_answer_fails_by_its_name(
    clock: VirtualTime, give: Callable[[], object], many: bool
) -> None:
    pair: dict[str, Any] = {"load_resource": load, "save_resource": lambda *_: give()}
    if many:
        pair = {"load_resources": dict.fromkeys, "save_resources": lambda _: give()}
    with Processor(min_duration=0, **pair) as processor:
        failed = answer_of(processor.run, "k", lambda _: None)
        gevent.sleep(0)
    assert type(failed) is SaveFailed
    assert "which has done its work when it returns" in str(failed.__cause__)


class Base(DeclarativeBase): ...


class Mapped(Base):
    __tablename__ = "mapped"
    name = sa.Column(sa.String, primary_key=True)


engine = sa.create_engine("sqlite://")
STORES: list[tuple[Callable[[], object], str]] = [
    (lambda: SQLAlchemyStore.documents(LOOSE(URL), "t"), "engine is a URL ('postgresql://…'), but must be an Engine"),
    (
        lambda: SQLAlchemyStore.documents(LOOSE(sessionmaker()), "t"),
        "but must be an Engine: pass sqlalchemy.create_engine(url), or",
    ),
    (lambda: SQLAlchemyStore.documents(engine, LOOSE(Mapped)), "table is <class '"),
    (
        lambda: SQLAlchemyStore.mapped(LOOSE(URL), Mapped),
        "bind is a URL ('postgresql://…'), which is neither an Engine",
    ),
    (lambda: SQLAlchemyStore.mapped(engine, LOOSE(Mapped(name="a"))), "but must be a class that SQLAlchemy maps"),
    (lambda: SQLAlchemyStore.mapped(engine, Model), "entity is <class '"),
    (lambda: RedisStore(LOOSE("redis://a:secret@b")), "client is a URL ('redis://…'), but must be a redis.Redis"),
]


def nothing_taken() -> dict[str, Any]:
    return {}


def make_documents(**options: Any) -> object:
    return SQLAlchemyStore.documents(engine, "t", **options)


def make_mapped(**options: Any) -> object:
    return SQLAlchemyStore.mapped(engine, Mapped, prepare_connection=lambda *_: None, **options)


def make_redis(**options: Any) -> object:
    return RedisStore(redis.Redis(), **options)


FUNCTIONS: list[tuple[Callable[..., object], dict[str, Any], str]] = [
    (make_documents, {"missing": nothing_taken}, "missing(key): too many positional arguments"),
    (make_documents, {"encode": save, "decode": load}, "encode(resource): missing a required argument"),
    (make_documents, {"encode": load, "decode": nothing_taken}, "decode(state): too many positional arguments"),
    (make_mapped, {"missing": Mapped}, "missing(key): too many positional arguments"),
    (make_mapped, {"missing": open_later}, "an async function"),
    (make_mapped, {"tenant": load}, "tenant(): missing a required argument"),
    (make_redis, {"missing": nothing_taken}, "missing(key): too many positional arguments"),
    (make_redis, {"encode": nothing_taken}, "encode(resource): too many positional arguments"),
    (make_redis, {"decode": save}, "decode(state): missing a required argument"),
    (Processor, {"copy_resource": nothing_taken}, "copy_resource(resource): too many positional arguments"),
]


@pytest.mark.parametrize(("make", "options", "told"), FUNCTIONS, ids=range(len(FUNCTIONS)))
def test_a_function_of_a_store_that_does_not_take_what_it_is_called_with_is_refused(
    make: Callable[..., object], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(TypeError) as raised:
        make(**options)
    assert told in str(raised.value)


MISSING: list[tuple[Any, str]] = [
    (dict, "missing is the class dict, which would be called with the key: pass lambda key: dict()"),
    (list, "pass lambda key: list()"),
    (Counter, "pass lambda key: Counter()"),
]


@pytest.mark.parametrize("make", [make_documents, make_mapped, make_redis])
@pytest.mark.parametrize(("missing", "told"), MISSING, ids=[told for _, told in MISSING])
def test_a_store_refuses_a_class_of_pythons_that_makes_something_else_of_a_key(
    make: Callable[..., object], missing: Any, told: str
) -> None:
    with pytest.raises(TypeError, match=r"^missing is ") as raised:
        make(missing=missing)
    assert told in str(raised.value)


def test_a_class_of_the_users_that_is_made_of_a_key_is_taken() -> None:
    make_documents(missing=Model)


@pytest.mark.parametrize(("make", "told"), STORES, ids=[told for _, told in STORES])
def test_a_store_names_what_is_no_engine_no_client_and_no_class(make: Callable[[], object], told: str) -> None:
    with pytest.raises(TypeError) as raised:
        make()
    assert told in str(raised.value)
    assert "secret" not in str(raised.value)


# -- an operation that does not take what it is given ----------------------------------------------------------


def book_for(train: list[Any], seat: int, name: str) -> None:
    train.append((seat, name))


def book_inside(train: list[Any]) -> None:
    book_for(train)  # type: ignore[call-arg]


def given_to(processor: Processor[Any], *call: Any, **options: Any) -> str:
    with pytest.raises(TypeError) as raised:
        processor.run("k", *call, **options)
    assert type(raised.value) is TypeError
    return str(raised.value)


@pytest.mark.parametrize("batching", [True, False], ids=["batching", "alone"])
def test_an_operation_that_does_not_take_its_arguments_is_named_with_its_key(batching: bool) -> None:
    saved: list[Any] = []
    with Processor(
        load_resource=lambda _: list(saved), save_resource=lambda _, train: saved.extend(train), batching=batching
    ) as processor:
        nothing = "; nothing of it was saved"
        missing = "book_for() missing 1 required positional argument: 'name'"
        name = "the operation book_for on key 'k' was called with the resource"
        assert given_to(processor, book_for, 1) == f"{name} and 1 argument: {missing}{nothing}"
        seat = missing.replace("name", "seat")
        assert given_to(processor, partial(book_for, name="Ann")) == f"{name} alone: {seat}{nothing}"
        assert given_to(processor, book_for, [1]) == f"{name} and 1 argument: {missing}{nothing}"  # which is copied
        assert given_to(processor, list.append, 1, 2).startswith("the operation list.append on key 'k' was called")
        many = "and 3 arguments: book_for() takes 3 positional arguments but 4 were given"
        assert given_to(processor, book_for, 1, "Ann", 2) == f"{name} {many}{nothing}"
        assert given_to(processor, book_inside).startswith("book_for() missing 2 required positional arguments")
        processor.run("k", book_for, 1, "Ann")
    assert saved == [(1, "Ann")]


def test_a_type_error_that_was_recorded_is_given_again_as_it_was(tmp_path: Path) -> None:
    def refuse(_: Any) -> None:
        raise TypeError("it is closed")

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'documents.sqlite'}")
    outcomes = idempotency_table("outcomes")
    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {}, idempotency=outcomes)
    store.create_table()
    with Processor(open_resource=store, min_duration=0) as processor:
        for _ in range(2):
            assert given_to(processor, refuse, idempotency_key="i") == "it is closed"
        missing = "book_for() missing 2 required positional arguments: 'seat' and 'name'"
        name = "the operation book_for on key 'k' was called with the resource alone"
        assert given_to(processor, book_for, idempotency_key="j") == f"{name}: {missing}; nothing of it was saved"
        assert given_to(processor, book_for, idempotency_key="j") == missing
    engine.dispose()


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("kind", [dict, list, str, int, object, type("Own", (), {}), type("OwnDict", (dict,), {})])
def test_a_class_whose_instances_are_no_context_managers_is_refused(kind: Any, many: bool) -> None:
    option = "open_resources" if many else "open_resource"
    options: dict[str, Any] = {option: kind}
    with pytest.raises(TypeError, match=f"{option} is the class {kind.__qualname__}, whose instances are no context"):
        Processor(**options)


def test_a_class_that_makes_what_it_likes_is_taken() -> None:
    class Opening:
        def __new__(cls, key: object) -> Any:
            return nullcontext([])

    for kind in (Opening, nullcontext, partial(nullcontext)):
        with Processor(open_resource=kind, min_duration=0) as processor:
            processor.run("k", lambda _: None)
