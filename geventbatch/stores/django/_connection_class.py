"""The class of a Django connection while operations run on it: tells its guard what they do, or refuses it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Hashable

    from django.db.backends.base.base import BaseDatabaseWrapper

GUARD: Final = "geventbatch_guard"
"""The attribute that holds the connection's guard."""

IN_PLACE: Final = ("atomic_blocks", "connection", "execute_wrappers", "savepoint_ids", "settings_dict")
"""Attributes that are changed in place: reading one counts as touching the session."""

TRANSACTION_STATE: Final = frozenset(
    {
        "autocommit",
        "close_at",
        "closed_in_transaction",
        "commit_on_exit",
        "connection",
        "errors_occurred",
        "health_check_done",
        "in_atomic_block",
        "needs_rollback",
        "rollback_exc",
        "run_commit_hooks_on_set_autocommit_on",
        "run_on_commit",
        "savepoint_state",
    }
)
"""Attributes in which Django keeps the state of a connection's transaction."""


class _Guarded:
    """Overrides methods of a connection while operations run on it."""

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[GUARD].touched()
        if name in IN_PLACE:
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    def make_cursor(self, cursor: Any) -> Any:
        this: Any = super()
        return _watched(this.make_cursor(cursor))

    def make_debug_cursor(self, cursor: Any) -> Any:
        this: Any = super()
        return _watched(this.make_debug_cursor(cursor))

    def on_commit(self, func: Any, robust: bool = False) -> None:  # noqa: FBT002 - Django's own signature
        this: Any = super()
        this.on_commit(func, robust)
        vars(self)[GUARD].has_hooked()

    def savepoint(self) -> str | None:
        guard, this = vars(self)[GUARD], cast("Any", super())
        guard.touched()
        guard.before_savepoint()
        with guard.aside():
            sid: str | None = this.savepoint()
        guard.has_savepoint(sid)
        return sid

    def savepoint_rollback(self, sid: str | None) -> None:
        guard, this = vars(self)[GUARD], cast("Any", super())
        guard.owns_savepoint(sid)
        with guard.aside():
            this.savepoint_rollback(sid)
        guard.is_rolled_back(sid)

    def savepoint_commit(self, sid: str | None) -> None:
        guard, this = vars(self)[GUARD], cast("Any", super())
        guard.owns_savepoint(sid)
        with guard.aside():
            this.savepoint_commit(sid)

    def set_rollback(self, rollback: bool) -> None:
        guard, this = vars(self)[GUARD], cast("Any", super())
        guard.touched()
        if rollback and guard.is_outermost:
            guard.refuse("set_rollback(True)", "raise an exception, or use a block of atomic() of its own")
        this.set_rollback(rollback)

    def close(self) -> None:
        this: Any = super()
        vars(self)[GUARD].refuse("close()", "the batch gives it back")
        this.close()

    def commit(self) -> None:
        this: Any = super()
        vars(self)[GUARD].refuse("commit()", "the batch commits, once, after all of its operations")
        this.commit()

    def rollback(self) -> None:
        this: Any = super()
        vars(self)[GUARD].refuse("rollback()", "raise an exception, or use a block of atomic() of its own")
        this.rollback()

    def set_autocommit(self, *args: Any, **options: Any) -> None:
        this: Any = super()
        vars(self)[GUARD].refuse("set_autocommit()", "the batch commits, once, after all of its operations")
        this.set_autocommit(*args, **options)


class _WatchedCursor:
    """Overrides cursor methods that Django shows to no `execute_wrapper`."""

    def callproc(self, *args: Any, **options: Any) -> Any:
        this: Any = super()
        _writes_unseen(self, f"CALL {options.get('procname', args[0] if args else '')}")
        return this.callproc(*args, **options)

    def copy(self, *args: Any, **options: Any) -> Any:
        this: Any = super()
        _writes_unseen(self)
        return (getattr(this, "copy", None) or this.__getattr__("copy"))(*args, **options)


def _writes_unseen(cursor: Any, called: str = "") -> None:
    guard = vars(cursor.db).get(GUARD)
    if guard is not None:
        guard.refuse_ending(called)
        guard.writes_unseen()


def _watched(cursor: Any) -> Any:
    kind: Any = type(cursor)
    cursor.__class__ = _watched_class(kind)
    return cursor


@cache
def _watched_class(kind: Hashable) -> Any:
    parent = cast("type[object]", kind)
    return type(parent.__name__, (_WatchedCursor, parent), {"__module__": parent.__module__})


def _reading(name: str) -> Any:
    def read(self: Any) -> Any:
        values = vars(self)
        values[GUARD].touched()
        if name == "settings_dict":
            values[GUARD].touched_settings()
        return values[name]

    return property(read)


for _name in IN_PLACE:
    setattr(_Guarded, _name, _reading(_name))


@cache
def connection_class(wrapper: Hashable) -> Any:
    """Return the class of a connection while operations run on it."""
    kind = cast("type[BaseDatabaseWrapper]", wrapper)
    return type(kind.__name__, (_Guarded, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
