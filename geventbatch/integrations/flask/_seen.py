"""Watches the statements of Flask-SQLAlchemy's ``db.session``: what its transaction has done when `run` is called."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet, ref

from gevent import getcurrent
from sqlalchemy import event
from sqlalchemy.sql.expression import ReleaseSavepointClause, RollbackToSavepointClause, SavepointClause
from sqlalchemy.sql.selectable import SelectState

from geventbatch.stores._sql.plain_selects import why_not_plain
from geventbatch.stores.sqlalchemy._engines import listen
from geventbatch.stores.sqlalchemy._session import BatchSession

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session, SessionTransaction

_SEEN: Final = "geventbatch"
"""The key in a session's `info`, and the attribute of its connections."""

_SAVEPOINTS: Final = (SavepointClause, ReleaseSavepointClause, RollbackToSavepointClause)

_LONGEST_SHOWN: Final = 80
"""Characters of a statement in a message."""

_listened: Final[WeakSet[Engine]] = WeakSet()
"""The engines whose statements are seen. (To ask SQLAlchemy costs each request 20 µs.)"""


class Seen:
    """What one transaction of a session has done."""

    def __init__(self, transaction: SessionTransaction) -> None:
        """Begin with nothing."""
        self._transaction = ref(transaction)
        self._greenlet = ref(getcurrent())
        # -- mutable state ---------------------------------------------------------------------------------
        self.why: str | None = None
        """Why its connection cannot be given back: the first statement that is no plain SELECT of the ORM."""
        self.giving_back = Lock()
        """Held by one of the greenlets of a request, which may all call `run`."""

    def is_of(self, transaction: SessionTransaction | None) -> bool:
        """Return whether it is *transaction* that was seen."""
        return self._transaction() is transaction

    def is_begun_here(self) -> bool:
        """Return whether this greenlet has begun the transaction."""
        return self._greenlet() is getcurrent()

    def sends(self, statement: str, context: Any) -> None:
        """Look at a *statement* before it is sent."""
        if self.why is None:
            which = _which(statement, context)
            if which is not None:
                text = " ".join(statement.split())
                text = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
                self.why = f"has sent {text!r}, which {which}"


def watch(session: Any) -> None:
    """See all that *session* (Flask-SQLAlchemy's, one for each application context) sends, from its next transaction.

    Switches: no.
    """
    if not event.contains(session, "after_begin", _begins):
        event.listen(session, "after_begin", _begins)


def seen_in(session: Session) -> Seen | None:
    """Return what the transaction of *session* has done; None if it has no connection. Switches: no."""
    seen: Seen | None = session.info.get(_SEEN)
    transaction = session.get_transaction()
    if seen is not None and seen.is_of(transaction):
        return seen
    if transaction is not None and getattr(transaction, "_connections", None):
        unseen = Seen(transaction)
        unseen.why = "began before GeventBatch.init_app() was called, which may have changed or locked something"
        return unseen
    return None


def _begins(session: Session, _: SessionTransaction, connection: Connection) -> None:
    """Note the connection: `after_begin`."""
    if isinstance(session, BatchSession):  # its class is a child of `session`'s
        return
    root = session.get_transaction()
    seen: Seen | None = session.info.get(_SEEN)
    if root is not None and (seen is None or not seen.is_of(root)):
        seen = session.info[_SEEN] = Seen(root)
    vars(connection)[_SEEN] = seen
    # A listener for each connection would cost more than the SELECT.
    if connection.engine not in _listened:
        _listened.add(connection.engine)
        listen(connection.engine, "before_cursor_execute", _sends)


def _sends(connection: Connection, _: Any, statement: str, __: Any, context: Any, ___: bool) -> None:  # noqa: FBT001 - an event
    seen: Seen | None = vars(connection).get(_SEEN)
    if seen is not None:
        seen.sends(statement, context)


def _which(statement: str, context: Any) -> str | None:
    """Return what *statement* does, after "which"; None if it is a plain SELECT of the ORM."""
    compiled: Any = getattr(context, "compiled", None)
    if compiled is not None and isinstance(compiled.statement, _SAVEPOINTS):
        return None
    state = getattr(compiled, "compile_state", None)
    # The ORM fetches all rows at once; the rows of another SELECT may be fetched after `run`.
    if not isinstance(state, SelectState) or type(state).__module__ != "sqlalchemy.orm.context":
        return "is no SELECT of the ORM, and may have changed or locked something"
    if {"yield_per", "stream_results"} & context.execution_options.keys():
        return "has rows that may not be fetched yet (yield_per, stream_results)"
    return why_not_plain(statement)
