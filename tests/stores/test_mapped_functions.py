"""A function of the user's in the database may write, although the query of an operation only selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session

from geventbatch import Processor
from tests.support.callers import answer_of
from tests.support.mapped import EVERYWHERE, Bed, opened

if TYPE_CHECKING:
    from collections.abc import Iterator


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "functions_entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(20))


class Account(Base):
    __tablename__ = "functions_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)


ON_POSTGRES = """
    CREATE FUNCTION write_entry(text) RETURNS int LANGUAGE sql AS
    $$ INSERT INTO functions_entries (text) VALUES ($1) RETURNING 1 $$;
    CREATE FUNCTION pay(int) RETURNS int LANGUAGE sql AS
    $$ UPDATE functions_accounts SET balance = balance + $1 RETURNING balance $$;
    CREATE FUNCTION total() RETURNS bigint STABLE LANGUAGE sql AS $$ SELECT sum(balance) FROM functions_accounts $$
"""
ON_MARIADB = (
    """
    CREATE FUNCTION write_entry(written VARCHAR(20)) RETURNS INT
    BEGIN INSERT INTO functions_entries (text) VALUES (written); RETURN 1; END
    """,
    """
    CREATE FUNCTION pay(amount INT) RETURNS INT
    BEGIN UPDATE functions_accounts SET balance = balance + amount; RETURN 1; END
    """,
    "CREATE FUNCTION total() RETURNS INT READS SQL DATA RETURN (SELECT sum(balance) FROM functions_accounts)",
)


@pytest.fixture(scope="module", params=EVERYWHERE[1:])
def opened_bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with opened(request.param, Base, tmp_path_factory.mktemp("bed")) as bed:
        with bed.other.begin() as connection:
            for statement in ON_MARIADB if bed.server == "mariadb" else (ON_POSTGRES,):
                connection.exec_driver_sql(statement)
        yield bed


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Account(id=1))
    bed.statements.clear()
    return bed


def ask(account: Account, query: str) -> Any:
    session: Any = object_session(account)
    return session.scalar(sa.text(query))


def deposit(account: Account) -> int:
    account.balance += 1
    return account.balance


def texts(bed: Bed) -> list[str]:
    with bed.other.begin() as connection:
        return list(connection.scalars(sa.select(Entry.text)))


def write_and_raise(account: Account) -> None:
    ask(account, "SELECT write_entry('of nobody')")
    raise ValueError("no")


def test_what_a_function_wrote_for_an_operation_that_raised_is_not_committed(bed: Bed) -> None:
    operations = [
        deposit,
        write_and_raise,
        lambda account: ask(account, "SELECT Write_Entry ('of somebody')"),
        deposit,
    ]
    with Processor(open_resource=bed.store(Account), min_duration=0.02, clean_errors=(Exception,)) as processor:
        callers = [gevent.spawn(answer_of, processor.run, 1, operation) for operation in operations]
        answers = [caller.get() for caller in callers]
    assert answers[0::2] == [1, 1]
    assert answers[3] == 2
    assert isinstance(answers[1], ValueError)
    assert texts(bed) == ["of somebody"]


def test_what_a_function_has_made_of_the_row_is_found_by_the_operations_behind_and_not_written_over(bed: Bed) -> None:
    answers = bed.together(Account, 1, deposit, lambda account: ask(account, "SELECT pay(100)"), deposit, deposit)
    assert answers[0::2] == [1, 102]
    assert answers[3] == 103
    assert bed.read(sa.select(Account.balance)) == 103


def test_in_mode_version_what_a_function_writes_is_written_beside_the_row_that_was_read(bed: Bed) -> None:
    if bed.mode == "lock":
        return
    read: list[int] = []

    def note(account: Account) -> None:
        read.append(account.balance)
        if len(read) == 1:
            bed.write(sa.update(Account).values(balance=7))
        ask(account, f"SELECT write_entry('{account.balance}')")

    assert bed.together(Account, 1, note, note) == [None, None]
    assert texts(bed) == ["7", "7"]


def test_a_function_is_asked_about_once_and_one_that_only_reads_cuts_no_batch(bed: Bed) -> None:
    if bed.server == "mariadb":  # which does not say of a function whether it writes
        return

    def look(account: Account) -> int:
        return int(ask(account, "SELECT total() + sqrt(4)"))

    with bed.processor(Account) as processor:
        assert [processor.run(1, look) for _ in range(3)] == [2, 2, 2]
    assert sum("pg_proc" in statement for statement in bed.statements) == 1
    assert bed.together(Account, 1, deposit, look, look, deposit) == [1, 3, 3, 2]
    assert len(bed.updates()) == 2
