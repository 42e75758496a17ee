"""Tests of accounts on SQLAlchemy: what they commit goes with the rollback of the test, and operations are tried twice.

python -m pytest examples/testing/tests.py
"""

from gevent import monkey

monkey.patch_all()

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.testing import ImpureOperation, check_operations, joined_engine


class Base(DeclarativeBase):
    """Your models have one, too."""


class Account(Base):
    """A row, and an operation on it that changes first and checks then."""

    __tablename__ = "accounts"
    owner: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]

    def take(self, amount: int) -> None:
        """Change first, and refuse afterwards."""
        self.balance -= amount
        if self.balance < 0:
            raise ValueError("not enough")


@pytest.fixture
def connection() -> Iterator[sa.Connection]:
    """Whatever is committed on it is gone after the test."""
    engine = sa.create_engine("sqlite://", poolclass=StaticPool)  # or your application's
    Base.metadata.create_all(engine)
    with engine.connect() as connection:
        yield connection
        connection.rollback()
    engine.dispose()


@pytest.fixture
def accounts(connection: sa.Connection) -> Iterator[Processor[Account]]:
    """The application's processor, on that connection."""
    store = SQLAlchemyStore.mapped(
        joined_engine(connection), Account, missing=lambda owner: Account(owner=owner, balance=5)
    )
    with Processor(open_resource=store, max_duration=5, batching=False, clean_errors=(ValueError,)) as processor:
        yield processor


def test_what_is_taken_is_seen_by_the_session_of_the_test(
    accounts: Processor[Account], connection: sa.Connection
) -> None:
    accounts.run("Ann", Account.take, 3)
    with Session(connection, join_transaction_mode="create_savepoint") as session:
        assert session.get_one(Account, "Ann").balance == 2


def test_an_account_is_not_changed_by_a_refusal(accounts: Processor[Account]) -> None:
    with (
        pytest.raises(ImpureOperation, match=r"had changed resource\.balance by then, from 5 to -1"),
        check_operations(accounts),
    ):
        accounts.run("Ann", Account.take, 6)
