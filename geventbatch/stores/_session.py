"""The sessions of batches: as the user's own, but each on the connection of its batch, and asking its scope first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session, sessionmaker

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.stores._mapped import MappedScope

SCOPE: Final = "geventbatch"
"""Where a session has its scope, in its `info`."""


def session_factory(source: Any, mapper: Mapper[Any]) -> tuple[sa.Engine, Callable[..., Session]]:
    """The engine of *source*, an `Engine` or what makes sessions, and what makes the sessions of batches."""
    if isinstance(source, sa.Engine):
        return source, _sessions(Session, {}, source)
    maker = getattr(source, "session_factory", source)  # of a scoped_session
    if not isinstance(maker, sessionmaker):
        raise TypeError(f"{source!r} is neither an Engine nor a sessionmaker")
    with maker() as probe:
        bind = probe.get_bind(mapper)
    if not isinstance(bind, sa.Engine):
        raise TypeError(f"the sessions of {source!r} are bound to {bind!r}: a store needs an Engine")
    return bind, _sessions(maker.class_, maker.kw, bind)


def _sessions(parent: type[Session], options: dict[str, Any], engine: sa.Engine) -> Callable[..., Session]:
    """Sessions as the user's own, but each on the connection of its batch, whose events go to its scope."""
    own = {"expire_on_commit": False, "join_transaction_mode": "control_fully", "binds": None}
    if engine.dialect.name == "sqlite":
        own["autoflush"] = False
    batch_session = type("BatchSession", (_BatchSession, parent), {})
    maker = sessionmaker(class_=batch_session, **{**options, **own})
    event.listen(maker, "before_commit", lambda session: _scope(session).refuse_commit())
    event.listen(maker, "before_flush", lambda session, *_: _scope(session).flushes())
    event.listen(maker, "after_flush_postexec", lambda session, _: _scope(session).has_flushed())
    event.listen(maker, "after_soft_rollback", lambda session, _: _scope(session).rolled_back())
    event.listen(maker, "transient_to_pending", lambda session, instance: _scope(session).has_added(instance))
    return maker


class _BatchSession(Session):
    """Of a batch: on its connection, whatever the user's own class is bound to."""

    def get_bind(self, *_: Any, **__: Any) -> Any:
        """The connection of the batch."""
        return self.bind

    def flush(self, objects: Any = None) -> None:
        """Flush too what was changed in place: SQLAlchemy itself would believe that there is nothing to flush."""
        with _scope(self).flushing():
            super().flush(objects)

    def expire(self, *args: Any, **options: Any) -> None:
        """Write first what the operations before have changed, which would be forgotten."""
        _scope(self).is_forgotten()
        super().expire(*args, **options)

    def expire_all(self) -> None:
        """Likewise."""
        _scope(self).is_forgotten()
        super().expire_all()


def _scope(session: Session) -> MappedScope:
    return cast("MappedScope", session.info[SCOPE])
