"""SQLAlchemyStore in the contract suite: documents and mapped classes, on SQLite, PostgreSQL and MariaDB."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session
from sqlalchemy.pool import NullPool
from sqlalchemy.types import TypeDecorator

from geventbatch.stores import Reuse, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from geventbatch.stores.sqlalchemy._documents import KeyText
from tests.support import mariadb, pgbouncer, postgres_server, servers
from tests.support.adapters.base import ELSEWHERE, Adapter, Case, Missing, Step
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.proxy import Endpoint

Form = Literal["document", "mapped"]
Kind = Literal["lock", "version", "row", "reuse"]
Server = Literal["sqlite", "postgresql", "pgbouncer", "mariadb"]


class Number(TypeDecorator[int]):
    """A whole number as a text, so that one can be there that is none."""

    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> int | None:
        return None if value is None else int(value)


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(80), unique=True)


class Purse(Base):
    __tablename__ = "purses"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(KeyText, unique=True)
    total: Mapped[int] = mapped_column(Number)
    version: Mapped[int] = mapped_column(default=0)


OUTCOMES: Final = idempotency_table("outcomes", Base.metadata)


class SQLAlchemyAdapter(Adapter):
    """A place in a database: a file, a schema, a database of MariaDB's."""

    commit_answer = b"COMMIT"

    def __init__(self, place: Place, kind: Kind, proxy: Proxy | None, *, pipeline: bool) -> None:
        self.address = place.address
        self.proxy = proxy
        self.place = place
        self.kind = kind
        self.pipeline = pipeline
        self.engine = place.engine(proxy, pool_size=self.pool_size, max_overflow=0)
        self.direct = place.beside()
        if place.server == "mariadb":
            self.commit_marker, self.commit_answer = b"\x03COMMIT", b""  # others say SET AUTOCOMMIT

    def close(self) -> None:
        self.engine.dispose()
        self.direct.dispose()

    @property
    def mode(self) -> Literal["lock", "version"]:
        return "lock" if self.kind == "lock" else "version"

    def processor(self, *, missing: Missing = "raise", **options: Any) -> Any:
        return super().processor(missing=missing, **{"max_batches": self.pool_size, **options})

    def rows(self) -> list[str]:
        with self.direct.begin() as connection:
            return list(connection.scalars(sa.select(Entry.text).order_by(Entry.id)))

    @contextmanager
    def holding(self, key: str, total: int) -> Iterator[None]:
        with self.direct.begin() as connection:
            connection.execute(self.update(key, total))
            yield

    def get(self, key: str) -> int | None:
        with self.direct.begin() as connection:
            return self.found(connection, key)

    def put(self, key: str, total: int) -> None:
        with self.direct.begin() as connection:
            if connection.execute(self.update(key, total)).rowcount:
                return
        try:
            with self.direct.begin() as connection:
                connection.execute(self.insertion(key, total))
        except IntegrityError:
            with self.direct.begin() as connection:
                connection.execute(self.update(key, total))

    def outcomes(self) -> int:
        with self.direct.begin() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(OUTCOMES)) or 0

    def expire_outcomes(self) -> None:
        with self.direct.begin() as connection:
            connection.execute(sa.update(OUTCOMES).values(expires=1))

    def clear(self) -> None:
        with self.direct.begin() as connection:
            for table in Base.metadata.sorted_tables:
                connection.execute(sa.delete(table))

    def found(self, connection: sa.Connection, key: str) -> int | None:
        raise NotImplementedError

    def update(self, key: str, total: int) -> sa.Update:
        raise NotImplementedError

    def insertion(self, key: str, total: int) -> sa.Insert:
        raise NotImplementedError

    # -- how it breaks --------------------------------------------------------------------------------------

    def markers(self) -> dict[Step, bytes]:
        raise NotImplementedError

    @contextmanager
    def slow(self, step: Step) -> Iterator[Callable[[], bool]]:
        assert self.proxy is not None
        with self.proxy.hold(self.markers()[step]) as rule:
            yield rule.reached

    def terminate(self) -> None:
        with self.direct.connect() as connection:
            self.place.terminate(connection)

    def restart(self) -> None:
        postgres_server.restart()

    def flush(self) -> None:
        with self.direct.begin() as connection:
            connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
            connection.exec_driver_sql("SELECT pg_logical_emit_message(true, '', '')")

    def crash(self) -> None:
        postgres_server.restart("immediate")

    def open_connections(self) -> int:
        with self.direct.connect() as connection:
            return self.place.count(connection, busy=False)

    def busy_connections(self) -> int:
        pool: Any = self.engine.pool
        with self.direct.connect() as connection:
            return max(int(pool.checkedout()), self.place.count(connection, busy=True))


class DocumentAdapter(SQLAlchemyAdapter):
    def store(self, *, missing: Missing = "raise") -> SQLAlchemyStore[Any]:
        return SQLAlchemyStore.documents(
            self.engine,
            "documents",
            mode=self.mode,
            missing="raise" if missing == "raise" else lambda _: {"total": 0},
            pipeline=self.pipeline,
            idempotency=OUTCOMES,
            reuse_resource=Reuse() if self.kind == "reuse" else None,
        )

    def add(self, resource: dict[str, int], amount: int) -> int:
        resource["total"] += amount
        return resource["total"]

    def row(self, text: str) -> object:
        return Entry.__table__, {"text": text}

    def found(self, connection: sa.Connection, key: str) -> int | None:
        state = connection.scalar(sa.select(DOCUMENTS.c.state).where(DOCUMENTS.c.key == key))
        return None if state is None else int(state.removeprefix('{"total": ').removesuffix("}"))

    def update(self, key: str, total: int) -> sa.Update:
        counted = {} if self.kind == "lock" else {"version": DOCUMENTS.c.version + 1}
        state = f'{{"total": {total}}}'
        return sa.update(DOCUMENTS).where(DOCUMENTS.c.key == key).values(state=state, **counted)

    def insertion(self, key: str, total: int) -> sa.Insert:
        return sa.insert(DOCUMENTS).values(key=key, state=f'{{"total": {total}}}', version=1)

    def remove(self, key: str) -> None:
        with self.direct.begin() as connection:
            connection.execute(sa.delete(DOCUMENTS).where(DOCUMENTS.c.key == key))

    def corrupt(self, key: str) -> None:
        with self.direct.begin() as connection:
            connection.execute(sa.update(DOCUMENTS).where(DOCUMENTS.c.key == key).values(state="{"))

    def markers(self) -> dict[Step, bytes]:
        return {"load": b"FROM documents", "save": b"UPDATE documents", "commit": self.commit_marker}


class MappedAdapter(SQLAlchemyAdapter):
    def store(self, *, missing: Missing = "raise") -> SQLAlchemyStore[Any]:
        return SQLAlchemyStore.mapped(
            self.engine,
            Purse,
            by="name",
            version="version" if self.kind == "version" else None,
            mode=self.mode,
            missing="raise" if missing == "raise" else lambda name: Purse(name=name, total=0),
            pipeline=self.pipeline,
            idempotency=OUTCOMES,
        )

    def add(self, resource: Purse, amount: int) -> int:
        resource.total += amount
        return resource.total

    def row(self, text: str) -> Entry:
        return Entry(text=text)

    def insert(self, resource: Purse, text: str) -> None:
        session = object_session(resource)
        assert session is not None
        session.execute(sa.insert(Entry).values(text=text))

    def found(self, connection: sa.Connection, key: str) -> int | None:
        return connection.scalar(sa.select(Purse.total).where(Purse.name == key))

    def update(self, key: str, total: int) -> sa.Update:
        counted = {"version": Purse.version + 1} if self.kind == "version" else {}
        return sa.update(Purse).where(Purse.name == key).values(total=total, **counted)

    def insertion(self, key: str, total: int) -> sa.Insert:
        return sa.insert(Purse).values(name=key, total=total)

    def remove(self, key: str) -> None:
        with self.direct.begin() as connection:
            connection.execute(sa.delete(Purse).where(Purse.name == key))

    def corrupt(self, key: str) -> None:
        with self.direct.begin() as connection:
            connection.execute(sa.text("UPDATE purses SET total = 'none' WHERE name = :name"), {"name": key})

    def markers(self) -> dict[Step, bytes]:
        return {
            "load": b"FROM purses",
            "operation": b"INSERT INTO entries",
            "save": b"UPDATE purses",
            "commit": self.commit_marker,
        }


DOCUMENTS: Final = SQLAlchemyStore.documents(sa.create_engine("sqlite://"), "documents", metadata=Base.metadata).table


class Place:
    """Where the tables of one test are."""

    server: Server

    def __init__(self, address: str) -> None:
        self.address = address
        self.name = f"store_{uuid4().hex}"
        """Of the connections through the proxy."""

    def endpoint(self) -> Endpoint | None:
        """What the proxy leads to."""
        return None

    def engine(self, proxy: Proxy | None, **options: Any) -> sa.Engine:
        """Through *proxy*, or beside it."""
        return sa.create_engine(self.address, **options)

    def beside(self) -> sa.Engine:
        """For everybody else, beside *proxy*: no connection is left where somebody counts them."""
        return self.engine(None, poolclass=NullPool)

    def terminate(self, connection: sa.Connection) -> None:
        raise NotImplementedError

    def count(self, connection: sa.Connection, *, busy: bool) -> int:
        raise NotImplementedError


class SQLitePlace(Place):
    server = "sqlite"


_kept: defaultdict[str, list[sa.Engine]] = defaultdict(list)
"""Engines for others, by the schema of their place."""


class PostgresPlace(Place):
    server: Server = "postgresql"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        url, self.schema = address.split("#")[:2]
        self.url = sa.make_url(url).set(drivername="postgresql+psycopg")

    def endpoint(self) -> Endpoint:
        port = self.url.port or 5432
        host = self.url.host
        return (host, port) if host else f"{cast('str', self.url.query['host'])}/.s.PGSQL.{port}"

    def engine(self, proxy: Proxy | None, **options: Any) -> sa.Engine:
        settings: dict[str, Any] = {"options": f"-c search_path={self.schema} -c synchronous_commit=off"}
        url = self.url
        if proxy is not None:
            url = url.difference_update_query(["host"]).set(host=proxy.host, port=proxy.port)
            # So that the proxy sees what is sent.
            settings |= {"application_name": self.name, "sslmode": "disable", "gssencmode": "disable"}
            settings |= {"prepare_threshold": None}
        return sa.create_engine(url, connect_args=settings, **options)

    def beside(self) -> sa.Engine:
        """They are kept until the place is gone: a new one costs the server more than what is asked on it."""
        engine = self.engine(None, pool_pre_ping=True, max_overflow=-1)
        _kept[self.schema].append(engine)
        # A prepared statement fails when a test has changed its table.
        sa.event.listen(engine, "connect", lambda connection, _: setattr(connection, "prepare_threshold", None))
        return engine

    def terminate(self, connection: sa.Connection) -> None:
        named = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name")
        connection.execute(named, {"name": self.name})

    def count(self, connection: sa.Connection, *, busy: bool) -> int:
        named = sa.text("SELECT state FROM pg_stat_activity WHERE application_name = :name")
        states = connection.scalars(named, {"name": self.name}).all()
        return sum(state != "idle" for state in states) if busy else len(states)


class PgBouncerPlace(PostgresPlace):
    """PostgreSQL behind a pooler that lends its sessions for a transaction."""

    server = "pgbouncer"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.port = int(address.rpartition("#")[2])

    def endpoint(self) -> Endpoint:
        return "127.0.0.1", self.port

    def engine(self, proxy: Proxy | None, **options: Any) -> sa.Engine:
        if proxy is None:
            return super().engine(proxy, **options)
        url = self.url.difference_update_query(["host"]).set(host=proxy.host, port=proxy.port)
        settings = {"application_name": self.name, "sslmode": "disable", "gssencmode": "disable"}
        return sa.create_engine(url, connect_args=settings, **options)


class MariaPlace(Place):
    server = "mariadb"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        url, _, self.database = address.partition("#")
        self.url = sa.make_url(url).set(drivername="mysql+pymysql", database=self.database)

    def endpoint(self) -> Endpoint:
        socket = self.url.query.get("unix_socket")
        return cast("str", socket) if socket else (self.url.host or "127.0.0.1", self.url.port or 3306)

    def engine(self, proxy: Proxy | None, **options: Any) -> sa.Engine:
        url = self.url
        if proxy is not None:
            url = url.difference_update_query(["unix_socket"]).set(host=proxy.host, port=proxy.port)
        return sa.create_engine(url, **options)

    def terminate(self, connection: sa.Connection) -> None:
        for thread, _ in self._threads(connection):
            connection.execute(sa.text(f"KILL {thread}"))

    def count(self, connection: sa.Connection, *, busy: bool) -> int:
        return sum(not busy or command != "Sleep" for _, command in self._threads(connection))

    def _threads(self, connection: sa.Connection) -> list[tuple[int, str]]:
        listed = sa.text(
            "SELECT id, command FROM information_schema.processlist WHERE db = :name AND id <> CONNECTION_ID()"
        )
        return [(row.id, row.command) for row in connection.execute(listed, {"name": self.database})]


PLACES: Final[dict[Server, type[Place]]] = {
    "sqlite": SQLitePlace,
    "postgresql": PostgresPlace,
    "pgbouncer": PgBouncerPlace,
    "mariadb": MariaPlace,
}


@contextmanager
def fresh(server: Server, directory: Path) -> Iterator[str]:
    """The address of a new place, with all tables."""
    with _FRESH[server](directory) as address:
        yield address


@contextmanager
def _fresh_file(directory: Path) -> Iterator[str]:
    url = f"sqlite:///{directory / f'{uuid4().hex}.sqlite'}"
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    Base.metadata.create_all(engine)
    engine.dispose()
    yield url


@contextmanager
def _fresh_schema(_: Path) -> Iterator[str]:
    schema = f"place_{uuid4().hex}"
    servers.administer(f"CREATE SCHEMA {schema}; SET LOCAL search_path = {schema}; {_tables_of_postgres()}")
    address = f"{servers.postgres_url()}#{schema}"
    yield address
    for engine in _kept.pop(schema, ()):
        engine.dispose()
    servers.administer(f"DROP SCHEMA {schema} CASCADE")


@contextmanager
def _fresh_pooled_schema(directory: Path) -> Iterator[str]:
    with _fresh_schema(directory) as address, pgbouncer.pooled(address) as behind:
        yield behind


@cache
def _tables_of_postgres() -> str:
    """The statements that make them."""
    said: list[str] = []
    dialect = sa.make_url("postgresql+psycopg://").get_dialect()()
    engine = sa.create_mock_engine(
        "postgresql+psycopg://", lambda statement, *_, **__: said.append(str(statement.compile(dialect=dialect)))
    )
    Base.metadata.create_all(engine, checkfirst=False)
    return ";".join(said)


@contextmanager
def _fresh_database(_: Path) -> Iterator[str]:
    name = f"place_{uuid4().hex}"
    _execute(mariadb.url(), "mysql+pymysql", f"CREATE DATABASE {name}")
    address = f"{mariadb.url()}#{name}"
    Base.metadata.create_all(MariaPlace(address).beside())
    yield address
    _execute(mariadb.url(), "mysql+pymysql", f"DROP DATABASE {name}")


_FRESH: Final[dict[Server, Callable[[Path], AbstractContextManager[str]]]] = {
    "sqlite": _fresh_file,
    "postgresql": _fresh_schema,
    "pgbouncer": _fresh_pooled_schema,
    "mariadb": _fresh_database,
}


def _execute(url: str, driver: str, statement: str) -> None:
    engine = sa.create_engine(sa.make_url(url).set(drivername=driver), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))


@contextmanager
def opened(
    server: Server, form: Form, kind: Kind, address: str, *, pipeline: bool = True, bulk: bool = False
) -> Iterator[Any]:
    """The adapter at *address*; through a proxy where it is a server."""
    place = PLACES[server](address)
    with ExitStack() as stack:
        endpoint = place.endpoint()
        proxy = None if endpoint is None else stack.enter_context(Proxy(endpoint))
        adapter = (DocumentAdapter if form == "document" else MappedAdapter)(place, kind, proxy, pipeline=pipeline)
        adapter.bulk = bulk
        adapter.trips = 3 if bulk and form == "mapped" and kind != "lock" else 2  # one compares the rows
        stack.callback(adapter.close)
        yield adapter


def _case(
    server: Server, form: Form, kind: Kind, *, pipeline: bool = True, restarts: bool = False, bulk: bool = False
) -> Case:
    has_server = server != "sqlite"
    is_postgres = server in {"postgresql", "pgbouncer"}
    shown = "xmin" if is_postgres and kind == "row" else kind
    steps: dict[Step, bool] = {
        "load": True,
        "operation": form == "mapped",
        "save": not pipeline or server == "mariadb",  # else it is in one message with COMMIT
        "commit": True,
    }
    near = not pipeline or shown == "xmin"  # to one that is tested anyway
    return Case(
        name=f"sqlalchemy-{form}-{shown}-{server}{'' if pipeline else '-plain'}{'-bulk' if bulk else ''}",
        fresh=partial(fresh, server),
        opens=partial(opened, server, form, kind, pipeline=pipeline, bulk=bulk),
        has_across=bulk,
        has_locks=kind == "lock",
        has_rows=True,
        has_sql=has_server and form == "mapped",
        has_pool=has_server,
        has_proxy=has_server,
        can_corrupt=True,
        can_restart=restarts and postgres_server.GIVEN is None,
        knows_outcome=is_postgres or kind == "reuse",
        slow_steps=tuple(step for step, is_slow in steps.items() if is_slow) if has_server else (),
        nul_in_keys=not is_postgres,
        marks=(getattr(pytest.mark, server),) if server in ELSEWHERE else (pytest.mark.variants,) if near else (),
    )


CASES = (
    _case("sqlite", "document", "version"),
    _case("sqlite", "document", "reuse"),
    _case("sqlite", "mapped", "version"),
    _case("sqlite", "mapped", "row"),
    _case("postgresql", "document", "lock", restarts=True),
    _case("postgresql", "document", "version"),
    _case("postgresql", "document", "reuse", restarts=True),
    _case("postgresql", "document", "lock", pipeline=False),
    _case("postgresql", "document", "reuse", pipeline=False),
    _case("sqlite", "document", "version", bulk=True),
    _case("postgresql", "document", "lock", bulk=True),
    _case("postgresql", "document", "version", bulk=True, restarts=True),
    _case("postgresql", "document", "version", bulk=True, pipeline=False),
    _case("sqlite", "mapped", "version", bulk=True),
    _case("postgresql", "mapped", "lock", bulk=True),
    _case("postgresql", "mapped", "row", bulk=True, restarts=True),
    _case("postgresql", "mapped", "version", bulk=True, pipeline=False),
    _case("postgresql", "mapped", "lock", restarts=True),
    _case("postgresql", "mapped", "version"),
    _case("postgresql", "mapped", "row"),
    _case("pgbouncer", "document", "lock"),
    _case("pgbouncer", "document", "version"),
    _case("pgbouncer", "document", "version", pipeline=False),
    _case("pgbouncer", "document", "lock", bulk=True),
    _case("pgbouncer", "mapped", "lock"),
    _case("pgbouncer", "mapped", "version"),
    _case("pgbouncer", "mapped", "row", pipeline=False),
    _case("pgbouncer", "mapped", "version", bulk=True),
    _case("mariadb", "document", "lock"),
    _case("mariadb", "document", "version"),
    _case("mariadb", "document", "reuse"),
    _case("mariadb", "document", "lock", bulk=True),
    _case("mariadb", "document", "version", bulk=True),
    _case("mariadb", "mapped", "lock", bulk=True),
    _case("mariadb", "mapped", "row", bulk=True),
    _case("mariadb", "mapped", "lock"),
    _case("mariadb", "mapped", "version"),
    _case("mariadb", "mapped", "row"),
)
