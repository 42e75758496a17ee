#!/usr/bin/env bash
# SQLAlchemy 2.1.9: where a "commit" listener of an Engine raises, the connection goes back to the pool with its transaction open.
#
# The event comes before COMMIT is sent, so nothing is committed, and the caller is told of the listener's error. But the Connection counts as having
# committed by then: close() sends no ROLLBACK. The next user of that connection is inside the transaction of the one before: it reads
# the row that was never committed, and its own COMMIT commits that, too.
#
# Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet sqlalchemy==2.1.9
cat > "$folder/run.py" <<'PYTHON'
import sys

import sqlalchemy as sa

engine = sa.create_engine(f"sqlite:///{sys.argv[1]}/one.sqlite")
with engine.begin() as connection:
    connection.exec_driver_sql("CREATE TABLE t (x int)")


def refuse(_):
    raise OSError("a listener")


sa.event.listen(engine, "commit", refuse)
with engine.connect() as connection:
    connection.exec_driver_sql("INSERT INTO t VALUES (1)")
    try:
        connection.commit()
        told = "committed"
    except OSError as error:
        told = f"OSError: {error}"
sa.event.remove(engine, "commit", refuse)
other = sa.create_engine(f"sqlite:///{sys.argv[1]}/one.sqlite")
count = "SELECT count(*) FROM t"
with other.connect() as connection:
    committed = connection.exec_driver_sql(count).scalar()
with engine.connect() as connection:
    seen = connection.exec_driver_sql(count).scalar()
    connection.commit()
with other.connect() as connection:
    later = connection.exec_driver_sql(count).scalar()
print(f"SQLAlchemy {sa.__version__}: told {told!r}; committed {committed} rows, the next user of the pool sees {seen}, after its commit {later}")
assert (told, committed, seen, later) == ("OSError: a listener", 0, 1, 1)
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
