"""DjangoStore in the contract suite."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, TypeVarTuple, Unpack
from uuid import uuid4

import pytest
from django.db import IntegrityError, connections, transaction
from django.db.models import F
from gevent import getcurrent

from geventbatch import Processor
from geventbatch.stores import DjangoStore
from geventbatch.stores.django._connections import close_idle
from tests.support.adapters.base import ELSEWHERE, Adapter, Case, Missing, Step
from tests.support.django_project.start import database, endpoint, options_of, place
from tests.support.proxy import Proxy

from tests.support.django_project.bank.models import Account, Entry, Outcome, Purse  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

T = TypeVar("T")
Args = TypeVarTuple("Args")

Server = Literal["sqlite", "postgresql", "pgbouncer", "mariadb"]
Kind = Literal["lock", "version", "xmin", "row"]

TABLES: Final = (Account, Entry, Purse, Outcome)

MARKERS: Final[dict[Step, bytes]] = {
    "load": b'WHERE "bank_purse"."name" ',
    "operation": b'INSERT INTO "bank_entry"',
    "save": b'UPDATE "bank_purse"',
}

SAVE: Final[tuple[Step, ...]] = ("save",)
"""Where it is not in one message with COMMIT."""


class Requests(Processor[Purse]):
    """As requests use it, at whose end Django closes their own connections."""

    def run(
        self,
        key: Hashable,
        operation: Callable[[Purse, Unpack[Args]], T],
        /,
        *args: *Args,
        start_timeout: float | None = None,
        idempotency_key: str | None = None,
        identified_by: tuple[object, ...] | None = None,
        read_only: bool = False,
    ) -> T:
        how: Any = {"start_timeout": start_timeout, "idempotency_key": idempotency_key, "read_only": read_only}
        how["identified_by"] = identified_by
        try:
            return super().run(key, operation, *args, **how)
        finally:
            for connection in connections.all(initialized_only=True):
                if not connection.in_atomic_block:
                    connection.close()


class DjangoAdapter(Adapter):
    """A database with the tables of the test project."""

    def __init__(
        self, address: str, alias: str, direct: str, kind: Kind, proxy: Proxy | None, *, pipeline: bool, bulk: bool
    ) -> None:
        self.address = address
        self.proxy = proxy
        self._alias = alias
        self._direct = direct
        self._kind = kind
        self._closes = getcurrent()
        """The greenlet whose connection is closed with the place: a new one costs the server much."""
        self._pipeline = pipeline
        self.bulk = bulk
        self._is_mysql = connections[direct].vendor == "mysql"
        if self._is_mysql:
            self.commit_marker, self.commit_answer = b"\x03COMMIT", b""

    def store(self, *, missing: Missing = "raise") -> DjangoStore[Purse]:
        return DjangoStore(
            Purse,
            by="name",
            mode="lock" if self._kind == "lock" else "version",
            version="version" if self._kind == "version" else None,
            missing="raise" if missing == "raise" else _made,
            using=self._alias,
            pipeline=self._pipeline,
            idempotency=Outcome,
        )

    def processor(self, *, missing: Missing = "raise", **options: Any) -> Processor[Purse]:
        store = self.store(missing=missing)
        opens: Any = {"open_resources": store.open_resources} if self.bulk else {"open_resource": store}
        return Requests(
            **opens,
            **{"min_duration": 0, "max_duration": 30, "workers": 4, "max_batches": self.pool_size, **options},
        )

    # -- operations -----------------------------------------------------------------------------------------

    def add(self, resource: Purse, amount: int) -> int:
        resource.total += amount
        return int(resource.total)

    def row(self, text: str) -> Entry:
        return Entry(text=text)

    def insert(self, resource: Purse, text: str) -> None:
        Entry.objects.using(resource._state.db).create(text=text)

    # -- behind its back ------------------------------------------------------------------------------------

    @contextmanager
    def _behind(self) -> Iterator[str]:
        """A connection of this greenlet's, closed at the end if nobody else does so."""
        try:
            yield self._direct
        finally:
            if getcurrent() is not self._closes and not connections[self._direct].in_atomic_block:
                connections[self._direct].close()

    def get(self, key: str) -> int | None:
        with self._behind() as direct:
            return Purse.objects.using(direct).filter(name=key).values_list("total", flat=True).first()

    def put(self, key: str, total: int) -> None:
        with self._behind() as direct:
            if self._update(direct, key, total):
                return
            try:
                Purse.objects.using(direct).create(name=key, total=total)
            except IntegrityError:
                self._update(direct, key, total)

    def _update(self, direct: str, key: str, total: int) -> int:
        counted = {"version": F("version") + 1} if self._kind == "version" else {}
        return Purse.objects.using(direct).filter(name=key).update(total=total, **counted)

    def remove(self, key: str) -> None:
        with self._behind() as direct:
            Purse.objects.using(direct).filter(name=key).delete()

    def corrupt(self, key: str) -> None:
        with self._behind() as direct, connections[direct].cursor() as cursor:
            cursor.execute("UPDATE bank_purse SET total = 'none' WHERE name = %s", [key])

    def rows(self) -> list[str]:
        with self._behind() as direct:
            return list(Entry.objects.using(direct).order_by("id").values_list("text", flat=True))

    def outcomes(self) -> int:
        with self._behind() as direct:
            return Outcome.objects.using(direct).count()

    def expire_outcomes(self) -> None:
        with self._behind() as direct:
            Outcome.objects.using(direct).update(expires=1)

    def clear(self) -> None:
        with self._behind() as direct:
            for table in (Entry, Purse, Outcome):
                table.objects.using(direct).all()._raw_delete(direct)  # reads nothing, and a row may be corrupt

    @contextmanager
    def holding(self, key: str, total: int) -> Iterator[None]:
        with self._behind() as direct, transaction.atomic(using=direct):
            self._update(direct, key, total)
            yield

    # -- how it breaks --------------------------------------------------------------------------------------

    @contextmanager
    def slow(self, step: Step) -> Iterator[Callable[[], bool]]:
        assert self.proxy is not None
        marker = self.commit_marker if step == "commit" else MARKERS[step]
        with self.proxy.hold(marker.replace(b'"', b"`") if self._is_mysql else marker) as rule:
            yield rule.reached

    def terminate(self) -> None:
        for number, _ in self._sessions():
            self._ask(f"KILL {number}" if self._is_mysql else f"SELECT pg_terminate_backend({number})")

    def open_connections(self) -> int:
        if self._is_mysql:  # a session has no name there, and one of ours behind its back may be just ending
            assert self.proxy is not None
            return self.proxy.open_connections()
        return len(self._sessions())

    def busy_connections(self) -> int:
        return sum(state not in {"idle", "Sleep"} for _, state in self._sessions())

    def _sessions(self) -> list[tuple[Any, ...]]:
        if self._is_mysql:
            return self._ask(
                "SELECT id, command FROM information_schema.processlist WHERE db = %s AND id <> CONNECTION_ID()",
                connections[self._alias].settings_dict["NAME"],
            )
        return self._ask("SELECT pid, state FROM pg_stat_activity WHERE application_name = %s", self._alias)

    def _ask(self, statement: str, *params: str) -> list[tuple[Any, ...]]:
        with self._behind() as direct, connections[direct].cursor() as cursor:
            cursor.execute(statement, params)
            return list(cursor.fetchall() if cursor.description else [])


def _made(key: str) -> Purse:
    return Purse(name=key)


@contextmanager
def _opened(kind: Kind, address: str, *, pipeline: bool, bulk: bool) -> Iterator[Adapter]:
    with ExitStack() as stack:
        alias = f"store_{uuid4().hex}"
        through, options = {}, options_of(address)
        direct = stack.enter_context(database(address, create=False, options=options))
        proxy = None
        port = address.split("#")[2:]  # of a pooler
        if connections[direct].vendor != "sqlite":
            proxy = stack.enter_context(Proxy(("127.0.0.1", int(port[0])) if port else endpoint(direct)))
            through = {"HOST": proxy.host, "PORT": str(proxy.port)}
        if connections[direct].vendor == "postgresql":
            options = {
                **({} if port else options),
                "application_name": alias,
                "sslmode": "disable",
                "gssencmode": "disable",
            }
        stack.enter_context(database(address, alias=alias, create=False, settings=through, options=options))
        stack.callback(close_idle, alias)
        yield DjangoAdapter(address, alias, direct, kind, proxy, pipeline=pipeline, bulk=bulk)


def _case(server: Server, kind: Kind, *, pipeline: bool = True, bulk: bool = False) -> Case:
    has_server = server != "sqlite"
    is_postgres = server in {"postgresql", "pgbouncer"}
    steps: tuple[Step, ...] = ("load", "operation", "commit") if has_server else ()
    near = not pipeline or kind == "xmin"  # to one that is tested anyway
    return Case(
        name=f"django-{kind}-{server}{'' if pipeline else '-plain'}{'-bulk' if bulk else ''}",
        fresh=partial(place, server, models=TABLES),
        opens=partial(_opened, kind, pipeline=pipeline, bulk=bulk),
        has_locks=kind == "lock",
        has_across=bulk,
        has_rows=True,
        has_sql=True,
        has_pool=has_server,
        has_proxy=has_server,
        can_corrupt=True,
        knows_outcome=is_postgres,
        slow_steps=steps if pipeline and is_postgres else (*steps, *SAVE) if has_server else (),
        nul_in_keys=not is_postgres,
        marks=(getattr(pytest.mark, server),) if server in ELSEWHERE else (pytest.mark.variants,) if near else (),
    )


CASES = (
    _case("sqlite", "version"),
    _case("sqlite", "row"),
    _case("postgresql", "lock"),
    _case("postgresql", "version"),
    _case("postgresql", "xmin"),
    _case("postgresql", "version", pipeline=False),
    _case("pgbouncer", "lock"),
    _case("pgbouncer", "version"),
    _case("pgbouncer", "version", bulk=True),
    _case("mariadb", "lock"),
    _case("mariadb", "version"),
    _case("mariadb", "row"),
    _case("sqlite", "row", bulk=True),
    _case("postgresql", "lock", bulk=True),
    _case("postgresql", "version", bulk=True),
    _case("postgresql", "version", pipeline=False, bulk=True),
    _case("mariadb", "lock", bulk=True),
    _case("mariadb", "version", bulk=True),
)
