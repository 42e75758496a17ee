"""Notes in each connection's ``info`` how far the driver has come with SQLAlchemy's COMMIT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

if TYPE_CHECKING:
    from sqlalchemy import Dialect

COMMIT: Final = "geventbatch: commit"
"""The key of the progress of the last COMMIT: None, `SENT`, `DONE`."""

SENT: Final = "sent"
DONE: Final = "done"

_noting: Final[WeakSet[Dialect]] = WeakSet()
"""The dialects that note their COMMITs."""


def note_commits(dialect: Dialect) -> None:
    """Make *dialect* note the progress of each COMMIT: SQLAlchemy calls listeners before and after it.

    (A listener for each transaction would cost a tenth of a millisecond.)
    """
    if dialect in _noting:
        return
    _noting.add(dialect)
    commit = dialect.do_commit

    def do_commit(connection: Any) -> None:
        found = getattr(connection, "info", None)
        info: dict[Any, Any] = found if isinstance(found, dict) else {}  # psycopg's own `info` is another object
        info[COMMIT] = SENT
        commit(connection)
        info[COMMIT] = DONE

    vars(dialect)["do_commit"] = do_commit  # for this engine only
