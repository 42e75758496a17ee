#!/usr/bin/env bash
# SQLAlchemy 2.1.9: where a "checkin" listener of a pool raises, the pool loses that place for good. A "reset" listener that raises costs nothing.
#
# Both events belong to giving a connection back. The error of "reset" is logged and the connection replaced: the caller is not told. The error of
# "checkin" reaches the caller of close(), and the step behind the event, which puts the connection back, is not taken: the pool counts it as
# checked out although nobody has it, and neither closes it nor makes another. Garbage collection does not help. With pool_size=1 the next
# connect() ends in TimeoutError. engine.dispose() helps, since it makes a new pool.
#
# Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet sqlalchemy==2.1.9
cat > "$folder/run.py" <<'PYTHON'
import gc
import logging
import sqlite3
import sys

import sqlalchemy as sa

logging.getLogger("sqlalchemy.pool").addHandler(logging.NullHandler())


class Driver(sqlite3.Connection):
    closed = 0

    def close(self):
        Driver.closed += 1
        super().close()


def refuse(*_):
    raise OSError("a listener")


def seen_of(event):
    Driver.closed = 0
    url = f"sqlite:///{sys.argv[1]}/one.sqlite"
    engine = sa.create_engine(url, poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.1, connect_args={"factory": Driver})
    sa.event.listen(engine, event, refuse)
    connection = engine.connect()
    try:
        connection.close()
        told = "closed"
    except OSError as error:
        told = f"OSError: {error}"
    sa.event.remove(engine, event, refuse)
    del connection
    gc.collect()
    out, closed = engine.pool.checkedout(), Driver.closed
    try:
        engine.connect().close()
        following = "connected"
    except sa.exc.TimeoutError as error:
        following = type(error).__name__
    engine.dispose()
    engine.connect().close()
    return told, out, closed, following


found = {event: seen_of(event) for event in ("reset", "checkin")}
for event, (told, out, closed, following) in found.items():
    print(f"SQLAlchemy {sa.__version__}: {event}: told {told!r}; checked out {out}, closed {closed}; the next one: {following}")
assert found == {"reset": ("closed", 0, 1, "connected"), "checkin": ("OSError: a listener", 1, 0, "TimeoutError")}, found
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
