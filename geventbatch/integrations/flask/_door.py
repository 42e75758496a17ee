"""The door of `run` in a request that has used Flask-SQLAlchemy's ``db.session``.

A request that waits for its batch must not hold what the batch needs: a row's lock, or the last connections of the
pool. After plain SELECTs of the ORM (a login's, say) the session's connection is given back; after anything else, `run`
is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn
from weakref import WeakSet

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import IdentitySet

from geventbatch._safe_repr import shown
from geventbatch.errors import named
from geventbatch.integrations.flask._seen import seen_in
from geventbatch.integrations.flask._sqlalchemy import changed_in

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from flask import Flask
    from sqlalchemy.orm import Session

    from geventbatch.integrations.flask._seen import Seen

_told: Final[WeakSet[Flask]] = WeakSet()
"""The applications that were told that a session's connection is given back."""


class Caller:
    """The caller of `run`, whose sessions hold nothing while it waits."""

    def __init__(self, sessions: Iterable[Session]) -> None:
        """Wait."""
        self._sessions = tuple(sessions)

    def left(self) -> None:
        """Note that the caller goes on, and uses its sessions."""
        self._sessions = ()

    def give_back_again(self) -> None:
        """Give back a connection that an operation has taken, by loading attributes of the caller's instances.

        Switches: yes.
        """
        for session in self._sessions:
            if session.in_transaction():
                seen = _holds(session)
                # Another greenlet of the request may use the session meanwhile.
                if seen is not None and seen.is_begun_here() and _why_not(session, release=True) is None:
                    _give_back(session)


@contextmanager
def leaving(
    app: Flask, sessions: Mapping[Session, str], method: str, keys: tuple[Hashable, ...], *, release: bool | None
) -> Iterator[Caller]:
    """Let *sessions* hold nothing while their user waits; afterwards their instances are loaded again when used.

    Args:
        app: The application, which is told once.
        sessions: The ``db.session`` of the request, and of each application context around it; and what it is called.
        method: The method that was called, `run` or `run_across`, for the message.
        keys: The keys of the operation, for the message.
        release: The option ``release_session``.

    Raises:
        RuntimeError: A session's transaction may have changed or locked something, or *release* is False.
    Switches: yes.
    """
    for session, name in sessions.items():
        why = _why_not(session, release=release)
        if why is not None:
            _refuse(method, keys, name, why)
    for session in sessions:
        if _give_back(session) and release is None and app not in _told:
            _told.add(app)
            _tell(app, method)
    caller = Caller(sessions)
    try:
        yield caller
    finally:
        caller.left()
        for session in sessions:
            _refresh(session)


def _holds(session: Session) -> Seen | None:
    """Return what the transaction of *session* has done, if it has one, on a connection of the pool."""
    return seen_in(session) if session.in_transaction() and not isinstance(session.bind, Connection) else None


def _why_not(session: Session, *, release: bool | None) -> str | None:
    """Return why the connection of *session* cannot be given back, after its name; None if it can.

    Switches: only if listeners of a flush send something.
    """
    changed = changed_in(session)
    seen = seen_in(session) if session.in_transaction() else None
    if seen is None:
        return f"has changed {_named(changed[0])}" if changed else None
    if seen.why is not None:
        return seen.why
    changed += session.new
    if changed:
        return f"has changed or added {_named(changed[0])}"
    block = _block_of(session)
    if block is not None:
        return f"is inside {block}"
    if release is False:
        return "has read, and holds a connection (release_session=False)"
    if session.dirty:  # with the values that were there: no statement, unless a listener of the flush changes more
        session.flush()
    return seen.why


def _block_of(session: Session) -> str | None:
    """Return the block that a commit of *session* would not leave, if it is inside one."""
    if session.in_nested_transaction():
        return "begin_nested()"
    has_block = getattr(session, "_trans_context_manager", None) is not None  # which refuses all that comes later
    return "`with db.session.begin()`" if has_block else None


def _named(instance: object) -> str:
    """Return a name of *instance*: its own `repr` might load attributes, and flush before."""
    identity = inspect(instance).identity
    return f"<{type(instance).__name__} {'(new)' if identity is None else ', '.join(map(shown, identity))}>"


def _refuse(method: str, keys: tuple[Hashable, ...], name: str, why: str) -> NoReturn:
    raise RuntimeError(
        f"{method}() was called on {named(keys)} in a request whose {name} {why}: its batch might wait for what "
        "the request has locked, or for a connection, until its deadline; and a rollback of the request would not undo "
        f"what the batch has saved. Nothing was run. Call db.session.commit() (or rollback()) before {method}(); or "
        "do it in the operation, where db.session is the batch's"
    )


def _give_back(session: Session) -> bool:
    """End the transaction, in which only SELECTs were sent. Return whether there was one.

    The instances stay as they are, for operations to read.
    """
    seen = _holds(session)
    if seen is None:
        return False
    with seen.giving_back:
        if _holds(session) is seen:  # no other greenlet has done so
            _commit(session)
    return True


def _commit(session: Session) -> None:
    expires, session.expire_on_commit = session.expire_on_commit, False
    try:
        session.commit()
    except DBAPIError:  # the server has closed the connection: nothing was changed there
        session.rollback()
    finally:
        session.expire_on_commit = expires
    if not session.autobegin:  # the caller has begun the transaction, and goes on in one; it holds no connection yet
        session.begin()


def _refresh(session: Session) -> None:
    """Have the instances loaded again when they are used: batches have changed rows meanwhile. Switches: no."""
    changed = IdentitySet(changed_in(session))
    if not changed:
        session.expire_all()
        return
    for instance in list(session.identity_map.values()):
        if instance not in changed:
            session.expire(instance)


def _tell(app: Flask, method: str) -> None:
    app.logger.warning(
        "geventbatch: %s() was called in a request that had read through db.session. Its connection is given back to "
        "the pool (by a commit) while the request waits, since as many waiting requests as the pool has connections "
        "would leave none for their batches; afterwards, the request's instances are loaded again when they are used. "
        "GEVENTBATCH_RELEASE_SESSION = True says that this is meant, and False refuses such a call. Told once",
        method,
    )
