"""How far the driver has come with a COMMIT of SQLAlchemy's: each connection notes it in its ``info``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

if TYPE_CHECKING:
    from sqlalchemy import Dialect

COMMIT: Final = "geventbatch: commit"
"""Where a connection has how far the driver has come with the last COMMIT: None, `SENT`, `DONE`."""

SENT: Final = "sent"
DONE: Final = "done"

_noting: Final[WeakSet[Dialect]] = WeakSet()
"""The dialects whose COMMITs are noted."""


def note_commits(dialect: Dialect) -> None:
    """Have each connection note how far the driver has come with a COMMIT: SQLAlchemy calls others before and after it.

    (A listener of its own for each transaction would cost a tenth of a millisecond.)
    """
    if dialect in _noting:
        return
    _noting.add(dialect)
    commit = dialect.do_commit

    def do_commit(connection: Any) -> None:
        found = getattr(connection, "info", None)
        info: dict[Any, Any] = found if isinstance(found, dict) else {}  # psycopg's own has another one
        info[COMMIT] = SENT
        commit(connection)
        info[COMMIT] = DONE

    vars(dialect)["do_commit"] = do_commit  # of this engine alone
