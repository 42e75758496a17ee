"""Accounts in PostgreSQL, changed by workflows of DBOS, for `benchmarks.durable`: served by gunicorn's threads.

Its isolation is READ COMMITTED with locked rows, as in the other ways; DBOS's default, SERIALIZABLE, halves a hot row.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from dbos import DBOS, SetWorkflowID, SQLAlchemyDatasource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

THREADS: Final = 32
_LOCK: Final = sa.text("SELECT value FROM accounts WHERE key = ANY(:keys) ORDER BY key FOR UPDATE")
_ADD: Final = sa.text("UPDATE accounts SET value = value + :amount WHERE key = :key RETURNING value")

url: Final = os.environ["DATABASE_URL"]
DBOS(
    config={
        "name": "accounts",
        "system_database_url": url,
        "sys_db_pool_size": THREADS,
        "executor_id": "one",
        "application_version": "1",
        "log_level": "ERROR",
    }
)
source = SQLAlchemyDatasource.create(url, {"pool_size": THREADS})


def change(amounts: dict[str, int]) -> int:
    """Add the *amounts* to the accounts of these keys, and return what the last one has then."""
    session = source.sql_session()
    session.execute(_LOCK, {"keys": list(amounts)})
    values = [session.execute(_ADD, {"key": key, "amount": amount}).scalar_one() for key, amount in amounts.items()]
    return int(values[-1])


changed = source.transaction(isolation_level="READ COMMITTED")(change)


def move(amounts: dict[str, int]) -> int:
    """Be a workflow of one transaction."""
    value: int = changed(amounts)
    return value


moved = DBOS.workflow()(move)
DBOS.launch()


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """Answer POST /add/KEY, /transfer/SOURCE/TARGET and /read/KEY."""
    _, action, *keys = environ["PATH_INFO"].split("/")
    amounts = {"add": [1], "transfer": [-1, 1], "read": [0]}[action]
    with SetWorkflowID(environ.get("HTTP_IDEMPOTENCY_KEY") or os.urandom(16).hex()):
        value = moved(dict(zip(keys, amounts, strict=True)))
    content = json.dumps(value).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
    return [content]
