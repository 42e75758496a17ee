#!/usr/bin/env bash
# DBUtils 3.2.0, PooledDB: while one thread opens a new connection, no other can give its own back, nor take one.
#
# PooledDB.connection() opens what is missing, and checks what is idle, with the lock of the whole pool held, and close() of a connection
# needs the same lock. So each connection that is slow to open, to a server far away or one that restarts, is a pause for everybody, also for
# those who need no new one. Other pools (psycopg_pool, SQLAlchemy's QueuePool) open outside of their lock.
#
# The database is SQLite; its second connection takes a second to open. Exits 0 while giving the first one back waits for it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet dbutils==3.2.0
cat > "$folder/run.py" <<'PYTHON'
import sqlite3
import threading
import time
from importlib.metadata import version

from dbutils.pooled_db import PooledDB

slow = threading.Event()
opening = threading.Event()


def connect():
    if slow.is_set():
        opening.set()
        time.sleep(1)
    return sqlite3.connect("stock.sqlite", check_same_thread=False)


connect.dbapi = sqlite3


def seconds(call):
    started = time.monotonic()
    call()
    return time.monotonic() - started


pool = PooledDB(connect, maxconnections=10)
print("DBUtils", version("dbutils"))

mine = pool.connection()
slow.set()
newcomer = threading.Thread(target=pool.connection)
newcomer.start()
opening.wait()
give_back = seconds(mine.close)
newcomer.join()
print(f"giving a connection back while another one is opened: {'waits' if give_back > 0.5 else 'does not wait'}")
assert give_back > 0.5
PYTHON
cd "$folder"
"$folder/venv/bin/python" run.py
