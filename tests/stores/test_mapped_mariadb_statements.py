"""What operations may not send in the session of their batch, as MariaDB reads it; and what only looks so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import object_session

from tests.support.mapped_trains import Form, Train, places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.mapped_trains import Place

pytestmark = pytest.mark.mariadb

REFUSED = [
    "/*! COMMIT */",
    "/*!50000 COMMIT*/",
    "/*M!100100 COMMIT */",
    "# so\nCOMMIT",
    "-- so\nCOMMIT",
    "COMMIT AND CHAIN",
    "SET autocommit = 1",
    "SET STATEMENT max_statement_time = 1 FOR COMMIT",
    "EXECUTE IMMEDIATE 'COMMIT'",
    "BEGIN NOT ATOMIC COMMIT; END",
    "IF 1 THEN COMMIT; END IF",
    "CASE WHEN 1 THEN COMMIT; END CASE",
    "here: LOOP COMMIT; LEAVE here; END LOOP",
    "SELECT GET_LOCK('a', 0)",
    "SELECT `GET_LOCK` ('a', 0)",
    "SELECT /*! GET_LOCK('a', 0) */",
    "SELECT RELEASE_LOCK('a')",
    "DO GET_LOCK('a', 0)",
    "SET @a = 1",
    "SELECT @a := 1",
    "SELECT @`a` := 1",
    "SELECT 1 INTO @a",
    "SELECT 1 INTO @`a`",
    "SET @@sql_mode = ''",
    "SET SESSION sql_mode = ''",
    "SET NAMES latin1",
    "LOCK TABLES mapped_trains READ",
    "LOCK TABLE `mapped_trains` AS `t` WRITE",
    "UNLOCK TABLES",
    "FLUSH TABLES",
    "CREATE TEMPORARY TABLE mine (id int)",
    "CREATE TABLE mine (id int)",
    "CREATE OR REPLACE TABLE mine (id int)",
    "CREATE INDEX mine ON mapped_trains (note(10))",
    "ALTER TABLE `mapped_trains` COMMENT 'a'",
    "TRUNCATE TABLE mapped_bookings",
    "ANALYZE TABLE mapped_bookings",
    "PREPARE mine FROM 'COMMIT'",
    "HANDLER mapped_trains OPEN",
    "USE mysql",
]
READ = [
    "SELECT `commit` FROM (SELECT 1 AS `commit`) AS `set`",
    "SELECT 1 # ; COMMIT",
    "SELECT 1 -- ; COMMIT",
    "SELECT 1 /* ; COMMIT */",
    "SELECT 'it\\'s; COMMIT'",
    'SELECT "; COMMIT"',
    "SELECT @@autocommit",
    "SET STATEMENT max_statement_time = 1 FOR SELECT 1",
    "SELECT IS_FREE_LOCK('a')",
]


@pytest.fixture(scope="module")
def make_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with places(tmp_path_factory.mktemp("place")) as make:
        yield make


@pytest.fixture
def place(make_place: Any) -> Place:
    found: Place = make_place(Form("mariadb", "lock"))
    return found


def take(train: Train) -> int:
    train.taken += 1
    return train.taken


def send(train: Train, statement: str) -> None:
    session: Any = object_session(train)
    session.connection().exec_driver_sql(statement)


@pytest.mark.parametrize("statement", REFUSED)
def test_what_would_reach_others_is_refused_to_who_sends_it(place: Place, statement: str) -> None:
    answers = place.run((take,), (send, statement), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], RuntimeError)
    assert "may not send" in str(answers[1])
    assert place.taken == 2


@pytest.mark.parametrize("statement", READ)
def test_what_only_looks_so_is_sent(place: Place, statement: str) -> None:
    assert place.run((take,), (send, statement), (take,)) == [1, None, 2]
    assert place.taken == 2


PROCEDURES = {
    "ends_it": "COMMIT",
    "begins_another": "COMMIT; START TRANSACTION; UPDATE mapped_trains SET note = 'so'",
    "rolls_back": "ROLLBACK; START TRANSACTION",
    "empties": "truncate table mapped_bookings",
    "calls": "CALL `only_writes`(); CALL ends_it",
    "executes": "SET @sent = 'COMMIT'; PREPARE sent FROM @sent; EXECUTE sent",
    "only_writes": "UPDATE mapped_trains SET note = 'so; COMMIT'; SELECT 7",  # and begins with BEGIN
}


@pytest.fixture
def calling(place: Place) -> Iterator[Place]:
    with place.direct.begin() as connection:
        for name, body in PROCEDURES.items():
            connection.exec_driver_sql(f"CREATE PROCEDURE {name}() BEGIN {body}; END")
    yield place
    with place.direct.begin() as connection:
        for name in PROCEDURES:
            connection.exec_driver_sql(f"DROP PROCEDURE {name}")


def call(train: Train, name: str) -> Any:
    session: Any = object_session(train)
    return session.scalar(sa.text(f"CALL {name}()"))


@pytest.mark.parametrize("name", [name for name in PROCEDURES if name != "only_writes"])
@pytest.mark.parametrize("many", [1, 4])
def test_a_procedure_that_ends_the_transaction_is_the_error_of_who_calls_it(
    calling: Place, name: str, many: int
) -> None:
    answers = calling.run((take,), *[(call, name), (take,)] * many)
    assert answers[::2] == list(range(1, many + 2))
    assert all("may end the transaction of its batch" in str(answer) for answer in answers[1::2])
    assert calling.taken == many + 1


def test_any_other_procedure_may_be_called_and_what_it_changes_is_found_behind(calling: Place) -> None:
    answers = calling.run((take,), (call, "only_writes"), (take,), (lambda train: train.note,))
    assert answers == [1, 7, 2, "so; COMMIT"]
    assert calling.scalar(sa.select(Train.note)) == "so; COMMIT"
    assert calling.taken == 2
