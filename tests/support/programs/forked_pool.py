"""A pool of psycopg2 at a fork, with a connection (``used``) or without; then the child and the parent run a batch.

python -m tests.support.programs.forked_pool DATABASE WHEN
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import os
import sys

from psycogreen.gevent import patch_psycopg  # type: ignore[import-untyped] # it has no types
from psycopg2.pool import ThreadedConnectionPool  # type: ignore[import-untyped] # likewise

from geventbatch import LoadFailed, Processor
from geventbatch.stores import SQLStore
from tests.support.children import wait_for


def add(row: dict[str, int]) -> int:
    row["stock"] += 1
    return row["stock"]


def main(database: str, when: str) -> None:
    patch_psycopg()
    pool = ThreadedConnectionPool(1 if when == "used" else 0, 2, database)
    store = SQLStore(
        pool,
        load="SELECT stock FROM shows WHERE id = %s FOR UPDATE",
        save="UPDATE shows SET stock = %(stock)s WHERE id = %(key)s",
        row=dict,
    )
    processor = Processor(open_resource=store, min_duration=0)
    child = os.fork()
    try:
        told = f"{'parent' if child else 'child'} {processor.run(1 if child else 2, add)}"
    except LoadFailed as error:
        told = f"child {error.__cause__}"
    sys.stdout.write(f"{told}\n")
    sys.stdout.flush()
    if not child:
        os._exit(0)
    wait_for(child)


if __name__ == "__main__":
    main(*sys.argv[1:])
