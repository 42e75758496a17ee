"""What programs of task queues batch: words, saved to a file; or to SQLite, once for each idempotency key.

A gate is a file, which the test makes when it lets them pass.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import gevent
import sqlalchemy as sa

from geventbatch import Processor
from geventbatch.stores.sqlalchemy import SQLAlchemyStore, idempotency_table

FOLDER = Path(os.environ["FOLDER"])
REDIS_URL = os.environ["REDIS_URL"]
QUEUE = os.environ["QUEUE"]


def note(what: str) -> None:
    with (FOLDER / "notes").open("a") as notes:
        notes.write(f"{what}\n")


def wait_for(gate: str) -> None:
    while not (FOLDER / gate).exists():
        gevent.sleep(0.01)


def load(key: str) -> list[str]:
    wait_for(f"load {key}")
    return []


def save(key: str, words: list[str]) -> None:
    note(f"saving {key}")
    wait_for(f"save {key}")
    with (FOLDER / "saved").open("a") as saved:
        saved.write("".join(f"{word}\n" for word in words))


processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=40)


def append(words: list[str], word: str) -> None:
    words.append(word)


def add(word: str) -> None:
    note(f"entered {word}")
    processor.run("waited for", append, word)
    note(f"finished {word}")


def add_later(word: str) -> None:
    note(f"frozen {gc.get_freeze_count()}")
    gevent.spawn(processor.run, "later", append, word)


engine = sa.create_engine(f"sqlite:///{FOLDER / 'ledger.sqlite'}")
metadata = sa.MetaData()
store = SQLAlchemyStore.documents(
    engine, "ledger", idempotency=idempotency_table("outcomes", metadata), missing=lambda _: list[str]()
)
ledger = Processor(open_resource=store, min_duration=0, max_duration=40)


def open_ledger() -> None:
    """Make its tables; from now on, its commits wait for a gate."""
    store.create_table()
    metadata.create_all(engine)
    sa.event.listen(engine, "commit", lambda _connection: wait_for("commit"))


def count(word: str, task: str) -> None:
    """Add it to the ledger, once for each *task*."""
    note(f"entered {word}")
    try:
        ledger.run("ledger", append, word, idempotency_key=task)
    except BaseException:
        note(f"interrupted {word}")
        raise
    note(f"applied {word}")
    wait_for("return")
    note(f"finished {word}")
