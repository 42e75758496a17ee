"""Makes Flask-SQLAlchemy's ``db.session`` in a batch the session of the resource.

``db.session`` is kept per application context, and a batch has one of its own. A store that loads through
``db.session`` needs no more. If the store has a session for each batch, as `SQLAlchemyStore`, that session is put in
its place. Otherwise, what an operation adds to ``db.session`` would be in no transaction at all.

The ``db.session`` of a request that calls `run` is another one: `_seen` watches it, and `_door` has it hold nothing
while `run` waits. SQLAlchemy is imported only where Flask-SQLAlchemy is used.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

from flask.globals import _cv_app
from gevent import getcurrent

from geventbatch._core import process
from geventbatch.errors import named

if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager

    from flask import Flask
    from sqlalchemy.orm import Session

    from geventbatch.integrations.flask._door import Caller

_NAME: Final = "sqlalchemy"
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
    if _NAME not in app.extensions:
        return _NOTHING
    context = _cv_app.get(None)
    if context is None or context.app is not app or getcurrent() in process.running or not _registry(app).has():
        return _NOTHING
    from geventbatch.integrations.flask import _door

    return _door.leaving(app, _registry(app)(), method, keys, release=release)


def _registry(app: Flask) -> Any:
    return app.extensions[_NAME].session.registry
