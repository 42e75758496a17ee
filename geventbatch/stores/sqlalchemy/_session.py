"""The sessions of batches: as the user's own, but on the connection of their batch.

They report what operations do to their `Guard`, which refuses what would reach other callers' operations.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Mapper, Session, SessionTransaction, SessionTransactionOrigin, sessionmaker
from sqlalchemy.orm.attributes import instance_state

from geventbatch._safe_repr import named, shown
from geventbatch.stores.sqlalchemy import _listeners

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.stores.sqlalchemy._guard import Guard

_TRANSACTION: Final = "the batch ends its transaction, once, after all of its operations"
_SAVEPOINT: Final = f"{_TRANSACTION}; use `with session.begin_nested()` for what you may want to undo"

_KEPT: Final = {"_new", "_deleted", "_dirty", "_key_switches"}
"""What a session's transaction keeps for a rollback, by instance."""


def session_factory(source: Any, mapper: Mapper[Any]) -> tuple[sa.Engine, Callable[..., BatchSession]]:
    """Return the engine of *source* (an `Engine`, or a factory of sessions), and the factory of batches' sessions."""
    if isinstance(source, sa.Engine):
        return source, _sessions(Session, {}, source)
    maker = getattr(source, "session_factory", source)  # of a scoped_session
    if not isinstance(maker, sessionmaker):
        raise TypeError(
            f"bind is {named(source)}, which is neither an Engine nor a sessionmaker: pass "
            "sqlalchemy.create_engine(url), or what makes your sessions (of Flask-SQLAlchemy db.session, not db)"
        )
    with _as_in_flush(maker()) as probe:
        bind = probe.get_bind(mapper)
    if not isinstance(bind, sa.Engine):
        raise TypeError(
            f"the sessions of {shown(source)} are bound to {shown(bind)}: a store needs an Engine, "
            "in a test joined_engine(connection) of geventbatch.testing"
        )
    return bind, _sessions(maker.class_, maker.kw, bind)


def _sessions(parent: type[Session], options: dict[str, Any], engine: sa.Engine) -> Callable[..., BatchSession]:
    """Return a factory of sessions with the user's class and options, which report their events to their guard."""
    own = {"autobegin": True, "expire_on_commit": False, "join_transaction_mode": "control_fully", "binds": None}
    if engine.dialect.name == "sqlite":
        own["autoflush"] = False
    routes: Session | None = None
    if parent.get_bind is not Session.get_bind:
        routes = _as_in_flush(parent(**options))
    elif options.get("binds"):
        routes = Session(engine, binds=options["binds"])
    names = {"routes": routes, "own": engine, "around": copy_context()}
    batch_session = type("BatchSession", (BatchSession, parent), names)
    maker = sessionmaker(class_=batch_session, **{**options, **own})
    event.listen(maker, "before_commit", lambda session: session.batch_guard.refuse_commit())
    event.listen(maker, "before_flush", lambda session, *_: session.batch_guard.flushes())
    event.listen(maker, "after_flush_postexec", lambda session, context: session.batch_guard.has_flushed(context))
    event.listen(maker, "after_soft_rollback", lambda session, _: session.batch_guard.rolled_back())
    event.listen(maker, "transient_to_pending", lambda session, instance: session.batch_guard.has_added(instance))
    event.listen(maker, "persistent_to_detached", lambda session, instance: session.batch_guard.has_lost(instance))
    return cast("Callable[..., BatchSession]", maker)


def _as_in_flush(session: Session) -> Session:
    """Return *session*, marked as in a flush: a routing session may read from a replica, but writes to the primary."""
    session._flushing = True  # noqa: SLF001 - SQLAlchemy's own recipe of such a session asks for it
    return session


class _Setting:
    """An attribute that an operation sets only for itself."""

    def __init__(self, default: object = None) -> None:
        self._default = default

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, session: BatchSession | None, _: type) -> Any:
        return self if session is None else session.__dict__.get(self._name, self._default)

    def __set__(self, session: BatchSession, value: object) -> None:
        if session.batch_guard is not None:
            session.batch_guard.sets(session.__dict__, self._name)
        session.__dict__[self._name] = value


class Info(dict[Any, Any]):
    """The `info` of a session, in which an operation sets items only for itself."""

    def __init__(self, guard: Guard, values: dict[Any, Any]) -> None:
        """Begin with the *values* of the user's own sessions."""
        super().__init__(values)
        self._guard = guard

    def __setitem__(self, key: Any, value: Any) -> None:
        """Report the name first, so that its value can be reset."""
        self._guard.sets(self, key)
        super().__setitem__(key, value)

    def __delitem__(self, key: Any) -> None:
        """Report the key first, so that its value can be reset."""
        self._guard.sets(self, key)
        super().__delitem__(key)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]  # it takes whatever `update` does
        """Update by `__setitem__`."""
        self.update(other)
        return self

    # Implemented by the methods above. The methods of `dict` would bypass them.
    pop: Any = MutableMapping.pop
    popitem: Any = MutableMapping.popitem
    clear: Any = MutableMapping.clear
    update: Any = MutableMapping.update
    setdefault: Any = MutableMapping.setdefault


def _refused(name: str, instead: str) -> Any:
    """Return the method *name*, which is for the batch: an operation that calls it is told what to do *instead*."""

    def method(self: BatchSession) -> None:
        _guard(self).refuse(f"{name}()", instead)
        getattr(super(BatchSession, self), name)()

    return method


class _LazyInfo:
    """The `info` of a session, made when it is read first: most operations do not."""

    def __get__(self, session: BatchSession | None, kind: type) -> Any:
        if session is None:
            return self
        own = session.__dict__
        found = super(BatchSession, session).info  # which SQLAlchemy keeps in `own`
        if session.batch_guard is not None:
            found = own["info"] = Info(session.batch_guard, found)
        return found


class _Begun(SessionTransaction):
    """The transaction of a batch's session. It makes what it keeps for a rollback when that is needed first."""

    def _take_snapshot(self) -> None:
        if self.nested or self.parent is not None:
            super()._take_snapshot()

    def __getattr__(self, name: str) -> Any:
        """Make what a flush or a rollback looks for."""
        if name not in _KEPT:
            raise AttributeError(name)
        found: Any = WeakKeyDictionary()
        setattr(self, name, found)
        return found


class BatchSession(Session):
    """The session of a batch, on its connection, whatever the user's own class is bound to."""

    batch_guard: Guard | None = None
    routes: ClassVar[Session | None] = None
    """A session of the user's, which tells the engine of a mapper, if there are several."""
    own: ClassVar[sa.Engine | None] = None
    """The batch's engine."""
    around: ClassVar[Context]
    """The context in which the store was made: Flask-SQLAlchemy finds its engines only in an application's."""

    info: Any = _LazyInfo()
    autoflush: Any = _Setting()
    expire_on_commit: Any = _Setting()
    bind: Any = _Setting()
    twophase: Any = _Setting()
    execution_options: Any = _Setting(getattr(Session, "execution_options", {}))  # SQLAlchemy 2.0 has none

    def begin_watch(self, guard: Guard) -> None:
        """Report to *guard* from now on."""
        self.batch_guard = guard
        given = self.__dict__.get("info")
        if given is not None:
            self.__dict__["info"] = Info(guard, given)
        _listeners.watch(self, guard)

    def end_watch(self) -> None:
        """Report nothing any more: the session is closed."""
        if self.batch_guard is not None:
            self.batch_guard.end()

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Any:
        """Return the connection of the batch; raise for a mapper in another database, outside of its transaction."""
        found: Any = self.own if self.routes is None else self._route(self.routes, mapper, clause)
        if found is not self.own:
            # Two engines of one URL: of two bind keys; or a test has replaced one, and the store has the old one.
            replaced = self.own is not None and found.engine.url == self.own.url
            raise RuntimeError(
                f"{clause if mapper is None else mapper} is in another database ({shown(found)}) than the batch, whose "
                "transaction is only in its own: use another session for it, which is committed by itself"
                + ("; or its engine was replaced after the store was made (by init_app): make it anew" * replaced)
            )
        return self.bind if self.batch_guard is None else self.batch_guard.connection

    def _route(self, routes: Session, mapper: Any, clause: Any) -> Any:
        if self.batch_guard is not None and not self.batch_guard.ours:
            with suppress(Exception):  # the operation's caller may have no application context either
                return routes.get_bind(mapper, clause=clause)
        return self.around.copy().run(routes.get_bind, mapper, clause=clause)

    # -- the batch's transaction -------------------------------------------------------------------------------

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - as its parent
        if self._transaction is None and not begin:
            return _Begun(self, SessionTransactionOrigin.AUTOBEGIN)
        return super()._autobegin_t(begin)

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002 - as its parent
        """Send the savepoint at once: what a listener of `after_begin` then sends is no statement of an operation."""
        guard = _guard(self)
        if nested:
            guard.begins_savepoint()
        begun = super().begin(nested=nested)
        if nested:
            with guard.own():
                super().connection()
            guard.has_begun_savepoint(begun)
        return begun

    commit = _refused("commit", _TRANSACTION.replace("ends its transaction", "commits"))
    rollback = _refused("rollback", _SAVEPOINT)
    close = _refused("close", _TRANSACTION)
    reset = _refused("reset", _TRANSACTION)
    invalidate = _refused("invalidate", _TRANSACTION)
    prepare = _refused("prepare", _TRANSACTION)
    expunge_all = _refused("expunge_all", "it holds what the operations before have changed: expunge(instance)")

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> sa.Connection:
        """Return the connection; what an operation does with it directly is checked after the operation."""
        guard = _guard(self)
        guard.check_later()
        if execution_options:
            guard.refuse("connection(execution_options=…)", "pass them to execute(), for that statement only")
        return super().connection(bind_arguments, execution_options)

    # -- what it holds -----------------------------------------------------------------------------------------

    def flush(self, objects: Any = None) -> None:
        """Flush changes in place too, which SQLAlchemy itself does not see."""
        guard = _guard(self)
        if guard.is_loading and self.is_untouched():  # SQLAlchemy flushes before the query of the load
            return
        with guard.flush():
            super().flush(objects)

    def refresh(self, instance: object, *args: Any, **options: Any) -> None:
        """Flush earlier operations' changes first, which would be lost."""
        _guard(self).check_refresh()
        super().refresh(instance, *args, **options)

    def expire(self, instance: object, *args: Any, **options: Any) -> None:
        """Flush earlier operations' changes first, which would be lost."""
        _guard(self).check_refresh()
        super().expire(instance, *args, **options)

    def expire_all(self) -> None:
        """Flush earlier operations' changes first, which would be lost."""
        _guard(self).check_refresh()
        super().expire_all()

    def merge(self, instance: Any, *, load: bool = True, **options: Any) -> Any:
        """Flush earlier operations' changes first, if it takes *instance* for loaded: they would be lost."""
        if not load:
            _guard(self).check_refresh()
        return super().merge(instance, load=load, **options)

    def execute(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Flush earlier operations' changes first, if the statement refreshes instances."""
        _guard(self).check_execute(statement, options)
        return super().execute(statement, *args, **options)

    def scalar(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Flush earlier operations' changes first, if the statement refreshes instances."""
        _guard(self).check_execute(statement, options)
        return super().scalar(statement, *args, **options)

    def scalars(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Flush earlier operations' changes first, if the statement refreshes instances."""
        _guard(self).check_execute(statement, options)
        return super().scalars(statement, *args, **options)

    def expunge(self, instance: object) -> None:
        """Refuse to expunge changed instances, and the resource."""
        _guard(self).check_expunge(instance)
        super().expunge(instance)

    def delete(self, instance: object) -> None:
        """Flush first what was added; note whether it is the resource, which later operations must not find."""
        _guard(self).deletes(instance)
        super().delete(instance)
        _guard(self).has_deleted()

    def delete_all(self, instances: Any) -> None:
        """Flush first what was added; note whether the resource is among *instances*."""
        instances = list(instances)
        _guard(self).deletes(*instances)
        super().delete_all(instances)
        _guard(self).has_deleted()

    def bulk_save_objects(self, *args: Any, **options: Any) -> None:
        """Flush earlier operations' changes first, as before any statement."""
        with _guard(self).bulk():
            super().bulk_save_objects(*args, **options)

    def bulk_insert_mappings(self, *args: Any, **options: Any) -> None:
        """Flush earlier operations' changes first, as before any statement."""
        with _guard(self).bulk():
            super().bulk_insert_mappings(*args, **options)

    def bulk_update_mappings(self, *args: Any, **options: Any) -> None:
        """Flush earlier operations' changes first, as before any statement."""
        with _guard(self).bulk():
            super().bulk_update_mappings(*args, **options)

    def adopt(self, instance: object) -> None:
        """Take *instance*, which another session has loaded, alone, and given away, as `add` does. Call no listener."""
        own = self.__dict__
        heard, own["dispatch"] = own["dispatch"], _SILENT
        try:
            self._update_impl(instance_state(instance))
        finally:
            own["dispatch"] = heard

    def is_untouched(self) -> bool:
        """Return whether nothing in it was added, deleted, or changed as far as SQLAlchemy has seen."""
        return not (self._new or self._deleted or self.identity_map.check_modified())

    def adds_or_deletes(self) -> bool:
        """Return whether a flush would insert or delete something."""
        return bool(self._new or self._deleted)

    def touched(self) -> list[Any]:
        """Return what `dirty` does, without making a set of it."""
        return [state.obj() for state in self.identity_map._modified if state not in self._deleted]  # noqa: SLF001

    # -- for steps ---------------------------------------------------------------------------------------------

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Call no listener when the library's own savepoints are released: `after_commit` is for the save."""
        heard = self.__dict__["dispatch"]
        self.__dict__["dispatch"] = _SILENT
        try:
            yield
        finally:
            self.__dict__["dispatch"] = heard


class _NoListeners:
    """An event without listeners."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __call__(self, *_: Any) -> None:
        pass


_NOBODY: Final = _NoListeners()


class _Silent:
    """A dispatcher without listeners for any event."""

    def __getattr__(self, _: str) -> _NoListeners:
        return _NOBODY


_SILENT: Final = _Silent()


def _guard(session: Session) -> Guard:
    guard = cast("BatchSession", session).batch_guard
    assert guard is not None  # noqa: S101 - set right after the session is made
    return guard
