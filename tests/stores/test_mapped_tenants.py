"""A schema for each tenant: nothing of a batch goes to the tables of another one."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.mapped import ON_POSTGRES

if TYPE_CHECKING:
    from collections.abc import Iterator

TENANT: ContextVar[str] = ContextVar("TENANT")
TENANTS = ("north", "south")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "tenant_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)


class Invoice(Base):
    __tablename__ = "tenant_invoices"
    __table_args__ = {"schema": "own"}  # noqa: RUF012 - as SQLAlchemy types it
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)
    lines: Mapped[list[Line]] = relationship(lazy="joined")


class Line(Base):
    __tablename__ = "tenant_lines"
    __table_args__ = {"schema": "own"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    invoice_id: Mapped[int] = mapped_column(sa.ForeignKey(Invoice.id))
    price: Mapped[int] = mapped_column(default=0)


outcomes = idempotency_table("tenant_outcomes", Base.metadata)


class Tenants:
    """A database with two schemas of tenants."""

    def __init__(self, address: str, mode: Any, *, pipeline: bool) -> None:
        place = PLACES["postgresql"](address)
        self.engine = place.engine(None, pool_size=2, max_overflow=0)
        self._direct = place.beside()
        self.options = {"mode": mode, "pipeline": pipeline}
        self.schemas = {tenant: f"{tenant}_{uuid4().hex}" for tenant in TENANTS}
        for tenant, schema in self.schemas.items():
            with self.of(tenant).begin() as connection:
                connection.execute(sa.schema.CreateSchema(schema))
                Base.metadata.create_all(connection)
                connection.execute(sa.insert(Account).values(id=1, balance=0))
                connection.execute(sa.insert(Invoice).values(id=1, total=0))
                connection.execute(sa.insert(Line).values(id=1, invoice_id=1, price=1))

    def of(self, tenant: str) -> sa.Engine:
        """As one tenant's application has it."""
        names = {None: self.schemas[tenant], "own": self.schemas[tenant]}
        return self._direct.execution_options(schema_translate_map=names)

    def prepare(self, connection: sa.Connection, key: Any) -> None:
        connection.execute(sa.text(f"SET search_path TO {self.schemas[key[0]]}"))

    def balances(self) -> list[Any]:
        found = []
        for tenant in TENANTS:
            with self.of(tenant).connect() as connection:
                found.append(connection.scalar(sa.select(Account.balance).where(Account.id == 1)))
        return found

    def close(self) -> None:
        self.engine.dispose()
        for schema in self.schemas.values():
            with self._direct.begin() as connection:
                connection.execute(sa.schema.DropSchema(schema, cascade=True))
        self._direct.dispose()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fresh("postgresql", tmp_path_factory.mktemp("tenants")) as address:
        yield address


@pytest.fixture(params=ON_POSTGRES)
def tenants(request: pytest.FixtureRequest, address: str) -> Iterator[Tenants]:
    _, mode, pipeline = request.param
    tenants = Tenants(address, mode, pipeline=pipeline)
    yield tenants
    tenants.close()


def deposit(account: Account, amount: int) -> int:
    account.balance += amount
    return account.balance


def ask(processor: Processor[Any], tenant: str, *args: Any, **options: Any) -> Any:
    """As a request of *tenant*."""
    TENANT.set(tenant)
    return answer_of(processor.run, *args, **options)


def test_each_tenant_has_its_own_row_where_the_store_is_told_whose_it_is(tenants: Tenants) -> None:
    store = SQLAlchemyStore.mapped(
        tenants.engine,
        Account,
        tenant=TENANT.get,
        prepare_connection=tenants.prepare,
        missing=lambda key: Account(id=key, balance=100),
        idempotency=outcomes,
        **tenants.options,
    )
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        callers = [
            gevent.spawn(ask, processor, tenant, 1, deposit, amount)
            for tenant, amount in (("north", 1), ("south", 10), ("north", 2), ("south", 20))
        ]
        answers = [caller.get() for caller in callers]
        assert (max(answers[::2]), max(answers[1::2])) == (3, 30)
        assert tenants.balances() == [3, 30]
        assert gevent.spawn(ask, processor, "south", "7", deposit, 1).get() == 101
        again = [
            gevent.spawn(ask, processor, tenant, 1, deposit, 1, idempotency_key="order-7").get()
            for tenant in (*TENANTS, *TENANTS)
        ]
        assert again == [4, 31, 4, 31]
    assert tenants.balances() == [4, 31]
    with tenants.engine.connect() as connection:
        path = connection.exec_driver_sql("SHOW search_path").scalar()
    assert not any(schema in str(path) for schema in tenants.schemas.values())


def test_what_prepares_the_connection_and_fails_fails_the_load_and_gives_the_connection_back(tenants: Tenants) -> None:
    def prepare(connection: sa.Connection, key: Any) -> None:
        raise LookupError(key)

    store = SQLAlchemyStore.mapped(tenants.engine, Account, prepare_connection=prepare, **tenants.options)
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        for _ in range(3):
            failed = answer_of(processor.run, 1, deposit, 1)
            assert isinstance(failed.__cause__, LookupError)
            assert failed.retry_safe


def test_a_tenant_without_a_prepared_connection_is_refused(tenants: Tenants) -> None:
    with pytest.raises(ValueError, match="prepare_connection"):
        SQLAlchemyStore.mapped(tenants.engine, Account, tenant=TENANT.get)


def test_an_engine_that_translates_schemas_has_them_translated_in_a_batch(tenants: Tenants) -> None:
    def charge(invoice: Invoice, amount: int) -> int:
        invoice.total += amount
        invoice.lines[0].price += amount
        return invoice.total

    for tenant, amount in (("north", 1), ("south", 10)):
        names = {None: tenants.schemas[tenant], "own": tenants.schemas[tenant]}
        engine = tenants.engine.execution_options(schema_translate_map=names)
        store = SQLAlchemyStore.mapped(engine, Invoice, **tenants.options)
        with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
            assert processor.run(1, charge, amount) == amount
        with tenants.of(tenant).connect() as connection:
            assert connection.scalar(sa.select(Invoice.total)) == amount
            assert connection.scalar(sa.select(Line.price)) == amount + 1
