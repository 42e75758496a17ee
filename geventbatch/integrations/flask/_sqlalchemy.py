"""Makes Flask-SQLAlchemy's ``db.session`` in a batch the session of the resource.

``db.session`` is kept per application context, and a batch has one of its own. A store that loads through
``db.session`` needs no more. If the store has a session for each batch, as `SQLAlchemyStore`, that session is put in
its place. Otherwise, what an operation adds to ``db.session`` would be in no transaction at all.

The ``db.session`` of a request that calls `run` is another one: `_seen` watches it, and `_door` has it hold nothing
while `run` waits. SQLAlchemy is imported only where Flask-SQLAlchemy is used.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import Token
from typing import TYPE_CHECKING, Any, Final

from flask.globals import _cv_app
from gevent import getcurrent

from geventbatch._core import process
from geventbatch.errors import named

if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager

    from flask import Flask
    from flask.ctx import AppContext
    from sqlalchemy.orm import Session

    from geventbatch.integrations.flask._door import Caller

_NAME: Final = "sqlalchemy"
_OURS: Final = "geventbatch"
_NOTHING: Final = nullcontext()


def adopt_session(app: Flask, resource: object) -> None:
    """Make the session of *resource*, if it has one, ``db.session`` in the current application context."""
    if _NAME not in app.extensions:
        return
    from sqlalchemy.orm import object_session
    from sqlalchemy.orm.exc import UnmappedInstanceError

    try:
        session = object_session(resource)
    except UnmappedInstanceError:
        return
    if session is not None:
        _registry(app).set(session)


def tell_of_lost_changes(app: Flask, keys: tuple[Hashable, ...]) -> None:
    """Log an error if changes were left in ``db.session`` after the save: no store knew of them."""
    if _NAME not in app.extensions or not _registry(app).has():
        return
    session = _registry(app)()
    left = [*session.new, *changed_in(session)]
    if left:
        app.logger.error(
            "The batch of %s is saved, but not what an operation changed in db.session, which its store does not "
            "save: %r. Use current_batch().add_row, where the store takes rows, or a store of mapped instances",
            named(keys),
            left[:10],
        )


def changed_in(session: Session) -> list[object]:
    """Return the instances that a flush of *session* would update or delete.

    Its `dirty` also has those whose attributes were set to the values that they had.
    """
    return [*filter(session.is_modified, session.dirty), *session.deleted]


# -- the session of a request that calls `run` ----------------------------------------------------------------


def watch_session(app: Flask, **_: object) -> bool:
    """See what ``db.session`` sends from now on. Return whether there is one; called again until then. Switches: no."""
    if _NAME not in app.extensions:
        return False
    from geventbatch.integrations.flask._seen import watch

    watch(app.extensions[_NAME].session)
    return True


def leaving(
    app: Flask, method: str, keys: tuple[Hashable, ...], *, release: bool | None
) -> AbstractContextManager[Caller | None]:
    """Return the context in which *method* waits on *keys*, and the ``db.session`` of its caller holds nothing.

    It yields None if the caller has used no session, or is inside a batch, whose session is the batch's.
    """
    context = _cv_app.get(None)
    if context is None or getcurrent() in process.running:
        return _NOTHING
    sessions = {
        session: "db.session" if one is context else "db.session outside of this application context"
        for one in reversed(_pushed(context))
        for session in _used_in(one)
    }
    if not sessions:
        return _NOTHING
    from geventbatch.integrations.flask import _door

    return _door.leaving(app, sessions, method, keys, release=release)


def _pushed(context: AppContext) -> list[AppContext]:
    """Return *context* and those that it was pushed into: ``with app.app_context():`` in a request has two sessions."""
    found = [context]
    for one in found:
        # Flask has no public way to see an outer context. Its next version keeps one token, not a list of them.
        for token in (*getattr(one, "_cv_tokens", ()), getattr(one, "_cv_token", None)):
            outer: Any = Token.MISSING if token is None else token.old_value
            if outer is not Token.MISSING and outer not in found:
                found.append(outer)
    return found


def _used_in(context: AppContext) -> list[Session]:
    """Return the ``db.session`` of *context*, if it was used and its statements are seen."""
    app = context.app
    if _NAME not in app.extensions or _OURS not in app.extensions:
        return []
    registry = _registry(app)
    token = _cv_app.set(context)
    try:
        return [registry()] if registry.has() else []
    finally:
        _cv_app.reset(token)


def _registry(app: Flask) -> Any:
    return app.extensions[_NAME].session.registry
