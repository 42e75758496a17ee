"""What an operation may not send in its batch's transaction (geventbatch/stores/_sql/statements.py)."""

from __future__ import annotations

import pytest

from geventbatch.stores._sql import statements
from geventbatch.stores._sql.statements import first_word

ENDS = [
    "BEGIN",
    "begin immediate",
    "START TRANSACTION",
    "COMMIT",
    "commit;",
    "COMMIT AND CHAIN",
    "END",
    "ROLLBACK",
    "Rollback To Savepoint here",
    "ABORT",
    "SAVEPOINT here",
    "RELEASE SAVEPOINT here",
    "PREPARE TRANSACTION 'one'",
    "XA END 'one'",
    "  \n\t/* by the way */ COMMIT",
    "-- by the way\nCOMMIT",
    "/* a /* nested */ one */ COMMIT",
    "SELECT 1; COMMIT",
    "INSERT INTO t VALUES ('it''s'); commit; begin",
    "INSERT INTO t VALUES (E'it\\'s'); COMMIT",
    "; ROLLBACK",
    "/*!50000 COMMIT */",
    "SELECT 1; /*M!100100 ROLLBACK */",
]

SETS = [
    "SET search_path = other",
    "set local role someone",
    "SET SESSION AUTHORIZATION someone",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "SET @@session.sql_mode = ''",
    "RESET ALL",
    "DISCARD TEMP",
    "LISTEN news",
    "UNLISTEN *",
    "PREPARE one AS SELECT 1",
    "DEALLOCATE ALL",
    "USE other",
    "LOCK TABLES t WRITE",
    "UNLOCK TABLES",
    "SELECT set_config('a.b', %s, true)",
    "WITH one AS (SELECT 1) SELECT SET_CONFIG('a.b', 'c', false) FROM one",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_lock_shared (1, 2)",
    "SELECT pg_advisory_unlock_all()",
    "SELECT \"set_config\" ('a.b', 'c', false)",
    'SELECT pg_catalog."pg_advisory_lock"(1)',
    'CREATE TABLE "pg_temp".t (x int)',
    "SELECT GET_LOCK('a', 1)",
    "EXECUTE IMMEDIATE 'COMMIT'",
    "HANDLER t OPEN",
    "LOCK INSTANCE FOR BACKUP",
    "DO RELEASE_LOCK('a')",
    "CREATE TEMP TABLE t (x int)",
    "create temporary table t as select 1",
    "CREATE LOCAL TEMPORARY TABLE t (x int)",
    "CREATE OR REPLACE TEMP VIEW v AS SELECT 1",
    "CREATE TABLE pg_temp.t (x int)",
    "DROP TEMPORARY TABLE t",
    "SELECT 1 AS x INTO TEMP t",
    "WITH one AS (SELECT 1) SELECT * INTO LOCAL TEMPORARY t FROM one",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "SELECT @total := 1",
    "SELECT @`a total` := 1",
    "SELECT 1 INTO @'total'",
    "SELECT x INTO @total FROM t",
    "PRAGMA foreign_keys = OFF",
    "PRAGMA main.synchronous(0)",
    "ATTACH DATABASE 'x' AS y",
    "DETACH y",
    "SELECT 1; SET x = 1",
    "SET STATEMENT max_statement_time=1 FOR SET @x = 1",
]

MAY = [
    "SELECT 1",
    "",
    "  ",
    "SELECT * FROM t FOR UPDATE SKIP LOCKED",
    "SELECT 'COMMIT; ROLLBACK'",
    "INSERT INTO t VALUES ('a; COMMIT', 'it''s; SET x = 1')",
    "INSERT INTO t VALUES (E'it\\'s; COMMIT')",
    'UPDATE t SET "commit; begin" = 1',
    "UPDATE t SET `set` = 1 WHERE lock_id = 2; ",
    "SELECT 1 -- ; COMMIT",
    "SELECT 1 /* ; COMMIT; set_config( */",
    "SELECT $$; COMMIT$$, $a$; SET x = 1; $$ $a$",
    "/* controller='seats; COMMIT' */ SELECT 1",
    "SELECT 1 -- it's\n",
    "INSERT INTO temp (temporary) VALUES (1)",
    "INSERT INTO temp SELECT 1",
    "SELECT pg_advisory_xact_lock(1), pg_try_advisory_xact_lock(2)",
    "SELECT get_lock FROM t",
    'SELECT "commit", "set_config" FROM "temp"."set" WHERE "a" IN (1)',
    'SELECT 1 AS x INTO "temp" FROM t',
    "SELECT * FROM begin",
    "SELECT commit, savepoint, set FROM t WHERE data @> '{}' AND a <@ b",
    "SELECT f(a := 1)",
    "WITH set AS (SELECT 1) UPDATE t SET x = 1",
    "CREATE TABLE t (x int)",
    "CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE u SET x = 1; END",
    "LOCK TABLE t IN SHARE ROW EXCLUSIVE MODE",
    "NOTIFY news",
    "PRAGMA table_info(t)",
    "PRAGMA foreign_keys",
    "SHOW search_path",
    "EXPLAIN SELECT 1",
    "SET STATEMENT max_statement_time=1.000 FOR SELECT * FROM t FOR UPDATE",
    "DECLARE c CURSOR FOR SELECT 1",
    "CALL settle()",
    "TRUNCATE t",
]


@pytest.mark.parametrize("statement", ENDS)
@pytest.mark.parametrize("mysql", [False, True])
def test_what_begins_or_ends_the_transaction_is_forbidden(statement: str, mysql: bool) -> None:
    if mysql and "nested" in statement:  # where comments do not nest
        statement = "COMMIT"
    why = statements.forbidden(statement, mysql=mysql)
    assert why is not None
    assert "transaction that all operations of the batch share" in why


@pytest.mark.parametrize("statement", SETS)
def test_what_sets_something_in_the_session_is_forbidden(statement: str) -> None:
    why = statements.forbidden(statement)
    assert why is not None
    assert "reach the operations of other callers" in why


@pytest.mark.parametrize("statement", MAY)
def test_everything_else_may_be_sent_whatever_stands_in_its_literals_and_comments(statement: str) -> None:
    assert statements.forbidden(statement) is None
    assert statements.forbidden(statement + " " * 3_000) is None  # too long to be remembered


@pytest.mark.parametrize(
    "statement",
    ["INSERT INTO t VALUES ('it\\'s; COMMIT')", "SELECT 1 # ; COMMIT it's", 'SELECT "; COMMIT"', "SELECT 'a\\\\'"],
)
def test_literals_and_comments_are_read_as_mysql_reads_them(statement: str) -> None:
    assert statements.forbidden(statement, mysql=True) is None


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE t ADD x int",
        "create table t (x int)",
        "TRUNCATE t",
        "drop table t",
        "BACKUP STAGE START",
        "STOP SLAVE",
    ],
)
def test_what_makes_mysql_commit_is_forbidden_there_alone(statement: str) -> None:
    assert statements.forbidden(statement) is None
    why = statements.forbidden(statement, mysql=True)
    assert why is not None
    assert "makes MySQL commit" in why


def test_the_reason_names_the_statement_and_what_to_do() -> None:
    assert statements.forbidden("select 1; start  transaction") == (
        "START TRANSACTION would begin or end the transaction that all operations of the batch share: the batch does "
        "that, and a savepoint is the ORM's (begin_nested(), atomic())"
    )


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        ("SELECT 1", "SELECT"),
        ("/* traceparent='00-ab' */ update t", "UPDATE"),
        ("-- one\n  -- two\n insert into t", "INSERT"),
        ("((select 1))", "SELECT"),
        ("# of MySQL\nDELETE FROM t", "DELETE"),
        ("", ""),
        ("-- nothing else", ""),
    ],
)
def test_the_first_word_stands_behind_blanks_brackets_and_comments(statement: str, word: str) -> None:
    assert first_word(statement) == word
