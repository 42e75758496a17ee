"""For docs/stores.md."""

import sqlite3
import tempfile
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from geventbatch import Processor, current_batch
from tests.support.pages.trains import DJANGO_TRAIN as REPLACED
from tests.support.pages.trains import Train, TrainModel, engine

client = redis.Redis()

current_tenant: ContextVar[str] = ContextVar("current_tenant")
SCHEMAS = {"north": "north", "south": "south"}

_directory = tempfile.TemporaryDirectory()
path = Path(_directory.name) / "accounts.sqlite"
with closing(sqlite3.connect(path)) as _made:
    _made.execute("CREATE TABLE account (name TEXT PRIMARY KEY, balance INTEGER CHECK (balance >= 0))")
    _made.execute("INSERT INTO account VALUES ('a', 10)")
    _made.commit()


def check(page: dict[str, Any]) -> None:
    """The store that is written there: what breaks a rule fails alone, as the database's own error."""

    def add(account: dict[str, int], amount: int) -> int:
        account["balance"] += amount
        return account["balance"]

    with page["accounts"] as accounts:
        assert accounts.run("a", add, 5) == 15
        with pytest.raises(sqlite3.IntegrityError):
            accounts.run("a", add, -20)
        assert accounts.run("a", add, 0) == 15
    _directory.cleanup()
