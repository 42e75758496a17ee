"""Flask-SQLAlchemy's ``db.session`` in a batch: it is the session that the resource lives in.

It is scoped by the application context, of which a batch has its own. A store that loads through it needs no more. One
that has a session for each batch, as `SQLAlchemyStore`, gets that one put in its place: what an operation adds to
``db.session`` would be in no transaction at all otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

_NAME = "sqlalchemy"


def adopt_session(app: Flask, resource: object) -> None:
    """Have ``db.session`` be the session of *resource* in the application context at hand, if it has one."""
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


def tell_of_lost_changes(app: Flask, key: object) -> None:
    """Log when something was left in ``db.session`` after a batch was saved: no store knew of it."""
    if _NAME not in app.extensions or not _registry(app).has():
        return
    session = _registry(app)()
    left = [*session.new, *session.dirty, *session.deleted]
    if left:
        app.logger.error(
            "The batch of key %r is saved, but not what an operation changed in db.session, which its store does not "
            "save: %r. Use current_batch().add_row, where the store takes rows, or a store of mapped instances",
            key,
            left[:10],
        )


def _registry(app: Flask) -> Any:
    return app.extensions[_NAME].session.registry
