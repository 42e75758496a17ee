"""Makes Flask-SQLAlchemy's ``db.session`` in a batch the session of the resource.

``db.session`` is kept per application context, and a batch has one of its own. A store that loads through
``db.session`` needs no more. If the store has a session for each batch, as `SQLAlchemyStore`, that session is put in
its place. Otherwise, what an operation adds to ``db.session`` would be in no transaction at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch.errors import named

if TYPE_CHECKING:
    from collections.abc import Hashable

    from flask import Flask

_NAME = "sqlalchemy"


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
    left = [*session.new, *session.dirty, *session.deleted]
    if left:
        app.logger.error(
            "The batch of %s is saved, but not what an operation changed in db.session, which its store does not "
            "save: %r. Use current_batch().add_row, where the store takes rows, or a store of mapped instances",
            named(keys),
            left[:10],
        )


def _registry(app: Flask) -> Any:
    return app.extensions[_NAME].session.registry
