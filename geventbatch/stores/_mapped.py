"""Instances of the user's own mapped classes: a Session per batch, on its own connection and in its own transaction.

What an operation may do, and what becomes of it when the operation raises:

- It may change the resource, and, through `object_session(resource)`, query, add other objects and change those.
  It must not end the session or its transaction: a commit is refused, and after a rollback the operation is broken.
- What an operation has added is taken out again when it raises. That it has left everything else as it was is what
  `clean_errors` promise; an operation that cannot promise that raises something that is not among them, and is replayed
  out. So is every operation that raises after it has written to the database (a flush, a statement of its own), and
  every one that leaves the transaction or the session failed.
- In SQLite a first write locks the whole database until COMMIT, and other greenlets run in between. So operations write
  nothing there: the session does not flush by itself before a query, and a statement that writes is refused.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Mapper, Session, sessionmaker
from sqlalchemy.orm.attributes import flag_modified
from sqlalchemy.orm.exc import StaleDataError

from geventbatch._processor import current_batch
from geventbatch.errors import Conflict, NotSaved, Rejected, ResourceMissing
from geventbatch.stores import _sql
from geventbatch.stores._outcomes import Outcomes, OutcomeTable, Recording
from geventbatch.stores._rows import insert_rows, is_instance
from geventbatch.stores._transaction import Transaction, load

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from types import TracebackType

    from sqlalchemy.orm import InstanceState, SessionTransaction
    from sqlalchemy.orm.attributes import InstrumentedAttribute

_EVENTS: Final = ("before_commit", "before_flush", "after_flush_postexec")
"""Of a session, in which others may want to add something to it."""

_SCOPE: Final = "geventbatch"
"""Where a session has its scope, in its `info`."""


@dataclass(kw_only=True)
class Mapping:
    """What the scopes of one store have in common."""

    engine: sa.Engine
    sessions: Callable[..., Session]
    transaction: Callable[[sa.Engine, Hashable], Transaction]
    mapper: Mapper[Any]
    by: tuple[InstrumentedAttribute[Any], ...]
    missing: Any
    locking: bool
    version: str | None
    """The attribute that counts the saves; None when there is none, or the mapper sees to it itself."""
    counts_itself: bool
    """The mapper has a `version_id_col`."""
    token: tuple[sa.ColumnElement[Any], ...]
    """What is compared at the save; where it is empty, all columns are."""
    outcomes: OutcomeTable | None = None

    @cached_property
    def name(self) -> str:
        """Of the class."""
        return str(self.mapper.class_.__name__)

    @cached_property
    def columns(self) -> dict[str, sa.ColumnElement[Any]]:
        """The columns of all attributes that are columns and nothing else."""
        columns = {attribute.key: attribute.columns[0] for attribute in self.mapper.column_attrs}
        return {name: column for name, column in columns.items() if isinstance(column, sa.Column)}

    @cached_property
    def load(self) -> sa.Select[Any]:
        """Fetches the instance, and the token."""
        entity = self.mapper.class_
        found = sa.select(entity, *self.token).where(*self._is_row())
        return found.with_for_update(of=entity, key_share=True) if self.locking else found

    @cached_property
    def look(self) -> sa.Select[Any]:
        """Fetches something when the row is there."""
        return sa.select(self.by[0]).where(*self._is_row())

    def _is_row(self) -> list[sa.ColumnElement[bool]]:
        return [column == sa.bindparam(f"_{i}") for i, column in enumerate(self.by)]

    def parameters(self, key: Any) -> dict[str, Any]:
        """Those of `load`."""
        values = key if len(self.by) > 1 else (key,)
        return {f"_{i}": value for i, value in enumerate(values)}


class MappedScope:
    """One batch over one instance: entering loads it into a session, leaving flushes and commits that."""

    takes_rows = True
    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction
    _session: Session
    _root: SessionTransaction | None  # what the session has to be in still when it is saved
    _resource: Any
    _identity: tuple[Any, ...] | None  # of the row that was loaded; None: there was none
    _compared: tuple[sa.ColumnElement[Any], ...]  # what a save compares, where it has to
    _token: tuple[Any, ...]  # and what was loaded of that
    _mutable: dict[str, Any]  # copies of what was loaded and can change without SQLAlchemy's knowing

    def __init__(self, mapping: Mapping, key: Hashable) -> None:
        self._mapping = mapping
        self._key = key
        self._added: list[tuple[int, object]] = []  # with how many operations had returned before
        self._wrote = -1  # when an operation last wrote: how many had returned before
        self._spoils = -1  # when an operation last wrote what would stay if it raised: likewise
        self._flushing = False  # now
        self._writing = False  # the load, or the save
        self._claimed = mapping.locking  # the row is ours to write
        self._counted = False  # the version, for this batch

    def __enter__(self) -> Any:
        self._writing = True
        try:
            self._transaction, row = load(self._begin, self._fetch)
            self._root = self._session.get_transaction()
            self._resource = self._made() if row is None else self._found(row)
        except BaseException as error:
            self._end(error)
            raise
        self._writing = False
        return self._resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._writing = True
        try:
            if error is None:
                self._save()
        except BaseException as raised:
            self._end(raised)
            if isinstance(raised, Rejected):
                self._look_again(raised)
            raise
        self._end(error)

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """Take out what the operation has added; or say that its attempt cannot be saved any more. Switches: no."""
        turn = current_batch().completed
        refused = self._refusal(error, turn)
        if refused is None:
            mine = [added for when, added in self._added if when == turn]
            self._added = [(when, added) for when, added in self._added if when != turn]
            for added in mine:
                if added in self._session.new:
                    self._session.expunge(added)
        return refused

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """What is recorded of operations with these idempotency keys. Switches: yes."""
        return self._outcomes().find(self._transaction.send, keys)

    # -- load ------------------------------------------------------------------------------------------------

    def _begin(self) -> Transaction:
        mapping = self._mapping
        transaction = mapping.transaction(mapping.engine, self._key)
        event.listen(transaction.connection, "before_cursor_execute", self._executes)
        event.listen(transaction.connection, "commit", lambda _: self.refuse_commit())
        self._close_session()  # of a first try, on a connection that was lost
        session = self._session = mapping.sessions(bind=transaction.connection)
        session.info[_SCOPE] = self
        return transaction

    def _fetch(self, _: Transaction) -> Any:
        mapping = self._mapping
        try:
            return self._session.execute(mapping.load, mapping.parameters(self._key)).unique().one_or_none()
        except (ValueError, TypeError, LookupError) as error:  # of a column's type
            raise ValueError(f"the {mapping.name} {self._key!r} cannot be decoded: {error}") from error

    def _found(self, row: Any) -> Any:
        resource, *token = row
        state: InstanceState[Any] = sa.inspect(resource)
        self._identity = state.identity
        loaded = {name: state.dict[name] for name in self._mapping.columns if name in state.dict}
        self._mutable = _copies(loaded)
        self._token = tuple(token) or tuple({**loaded, **self._mutable}.values())
        self._compared = self._mapping.token or tuple(self._mapping.columns[name] for name in loaded)
        return resource

    def _made(self) -> Any:
        mapping = self._mapping
        self._identity, self._compared, self._token, self._mutable = None, (), (), {}
        if mapping.missing == "raise":
            raise ResourceMissing(f"there is no {mapping.name} {self._key!r}", key=self._key)
        resource = mapping.missing(self._key)
        if not isinstance(resource, mapping.mapper.class_):
            raise TypeError(f"missing made {resource!r} for {self._key!r}: it has to be a {mapping.name}")
        for attribute, value in zip(mapping.by, mapping.parameters(self._key).values(), strict=True):
            if getattr(resource, attribute.key) is None:
                setattr(resource, attribute.key, value)
        if mapping.version is not None and getattr(resource, mapping.version) is None:
            setattr(resource, mapping.version, 1)
        self._session.add(resource)
        return resource

    # -- operations ------------------------------------------------------------------------------------------

    def refuse_commit(self) -> None:
        """Something is to be committed: a savepoint, or all, which is for the batch to do."""
        if not self._writing and not self._session.in_nested_transaction():
            raise RuntimeError(
                f"an operation on {self._key!r} called commit() on its batch's session: the batch commits, once, after "
                "all of its operations"
            )

    def has_added(self, instance: object) -> None:
        """An operation has added *instance*."""
        if not self._writing:
            self._added.append((current_batch().completed, instance))

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """The session flushes, as far as the user knows it to have something to flush."""
        if "_resource" in self.__dict__:
            self._flag_mutated()
        self._flushing = True
        try:
            yield
        finally:
            self._flushing = False

    def is_forgotten(self) -> None:
        """What the session has loaded is about to be loaded anew."""
        if not self._writing:
            self._session.flush()

    def rolled_back(self) -> None:
        """A savepoint: nobody knows any more what the database has."""
        self._mutable = {}

    def has_flushed(self) -> None:
        """What can change in place is now as it is in the database."""
        state: InstanceState[Any] = sa.inspect(self._resource)
        loaded = {name: state.dict[name] for name in self._mapping.columns if name in state.dict}
        self._mutable = _copies(loaded)

    def flushes(self) -> None:
        """The session is about to flush: count the version, once."""
        session = self._session
        self._refuse_expressions()
        if self._changes():
            self._touch()
        deletes = self._resource in session.deleted
        if not deletes and not (self._resource in session.dirty and session.is_modified(self._resource)):
            return
        mapping = self._mapping
        if mapping.counts_itself:
            self._claimed = True  # it compares the version in this flush
        elif mapping.version is not None and not deletes and not self._counted:
            self._counted = True
            setattr(self._resource, mapping.version, getattr(self._resource, mapping.version) + 1)

    def _executes(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        """A statement is about to be sent on the connection: of the load, of an operation, of the save."""
        if _sql.without_prefix(statement).lstrip()[:6].upper().startswith(("SELECT", "SET ")):
            return
        if not self._writing:
            self._operation_writes()
        if not self._claimed:
            self._claim()
            self._claimed = True

    def _operation_writes(self) -> None:
        batch = current_batch()
        if not self._transaction.writes_anywhere and not batch.alone:
            raise RuntimeError(
                f"an operation on {self._key!r} would write to SQLite, and lock all of it while other greenlets run: "
                "add to the session, or to current_batch().add_row, what the batch is to write when it saves"
            )
        # What a flush writes was changed by those before, or by an operation that has to leave it as it was when it
        # raises; but for what it has added or deleted itself.
        added = any(when == batch.completed and one in self._session.new for when, one in self._added)
        self._wrote = max(self._wrote, 0)
        if not self._flushing or added or self._session.deleted:
            self._spoils = batch.completed

    def _claim(self) -> None:
        """Lock the row, and see that it is as it was loaded."""
        if self._identity is None:
            return
        mapper = self._mapping.mapper
        is_row = (column == value for column, value in zip(mapper.primary_key, self._identity, strict=True))
        claim = sa.select(*self._compared).select_from(mapper.selectable).where(*is_row)
        row = self._transaction.connection.execute(
            claim.with_for_update(of=mapper.local_table, key_share=True)
        ).one_or_none()
        if row is None or tuple(row) != self._token:
            raise self._conflict()

    def _conflict(self) -> Conflict:
        return Conflict(f"{self._key!r} was not saved: somebody else changed it since it was loaded")

    def _refusal(self, error: Exception, turn: int) -> NotSaved | None:
        if isinstance(error, NotSaved):
            return error
        if isinstance(error, StaleDataError) or self._is_raced(error):
            return self._conflict()
        if isinstance(error, (DBAPIError, PendingRollbackError)):
            refused = self._transaction.not_saved(error)
            found = _sql.kind(error)
            lost = self._transaction.connection.invalidated
            if found is _sql.Kind.CONFLICT or (found is _sql.Kind.LOST and lost):  # else it is of another server
                return refused
        # What it has marked as deleted cannot be told from what others have.
        if self._spoils == turn or self._session.deleted or not self._is_whole():
            return Rejected(f"{error!r} left the transaction of {self._key!r} so that it cannot be saved")
        return None

    def _is_raced(self, error: Exception) -> bool:
        """Whether a query of an operation has flushed the new row, which somebody else has inserted by then."""
        return (
            self._identity is None
            and isinstance(error, IntegrityError)
            and _sql.is_duplicate(error)
            and not sa.inspect(self._resource).persistent
        )

    def _is_whole(self) -> bool:
        """Whether the session is still in the transaction that it has loaded in, and nothing has failed there."""
        session = self._session
        below = self._transaction.connection.get_transaction()
        if below is None or not below.is_active:  # a commit of the Connection was refused, half way
            return False
        return session.get_transaction() is self._root and session.is_active and not self._transaction.has_failed()

    # -- save ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        batch = current_batch()
        session = self._session
        if not self._is_whole():
            raise Rejected(
                f"{self._key!r} was not saved: an operation ended the transaction of the batch, or went on after a "
                "statement had failed"
            )
        recording = Recording(self._outcomes(), batch.outcomes) if batch.outcomes else None
        if not batch.completed:  # whatever is in the session, nobody has made it
            self._transaction.write(lambda: None, recording)
            return
        if batch.deleted:
            self._delete()
        rows = batch.rows
        self._flag_mutated()
        if rows or self._wrote >= 0:
            self._touch()
        elif not self._transaction.writes_anywhere and not self._changes() and recording is None:
            return  # elsewhere a SELECT may have called a function that writes, so it is committed
        transaction = self._transaction
        transaction.committer = session.commit

        def write() -> None:
            try:
                session.flush()
                insert_rows(transaction.connection, rows, session)
            except StaleDataError as error:
                raise self._conflict() from error

        transaction.write(write, recording, collected=self._is_collected(rows))

    def _outcomes(self) -> Outcomes:
        mapping = self._mapping
        assert mapping.outcomes is not None  # noqa: S101 - else no operation has such a key
        columns = ", ".join([attribute.key for attribute in mapping.by])
        return Outcomes(mapping.outcomes, f"{mapping.mapper.local_table} by {columns}", self._key)

    def _is_collected(self, rows: Sequence[object]) -> bool:
        """Whether no statement of the flush needs an answer, and nothing is sent between it and COMMIT."""
        session = self._session
        return (
            self._claims_nothing()
            and not session.new
            and not session.deleted
            and not any(is_instance(row) for row in rows)
            and all(len(list(getattr(session.dispatch, name))) == 1 for name in _EVENTS)  # those are ours
            and not list(session.dispatch.after_flush)
        )

    def _claims_nothing(self) -> bool:
        session = self._session
        return self._claimed or (self._mapping.counts_itself and session.is_modified(self._resource))

    def _delete(self) -> None:
        session = self._session
        if self._resource in session.new:
            session.expunge(self._resource)
        elif self._resource in session:
            session.delete(self._resource)

    def _flag_mutated(self) -> None:
        """Tell SQLAlchemy of lists and dictionaries that were changed in place, which it does not see by itself."""
        if self._resource not in self._session:
            return
        loaded: dict[str, Any] = sa.inspect(self._resource).dict
        for name in self._mapping.columns:
            value = loaded.get(name)
            if isinstance(value, (list, dict, set, bytearray)) and (
                name not in self._mutable or self._mutable[name] != value  # or nobody knows what the database has
            ):
                flag_modified(self._resource, name)

    def _refuse_expressions(self) -> None:
        """An expression that one operation has assigned would be lost in that of the next one."""
        values: dict[str, Any] = sa.inspect(self._resource).dict
        for name in self._mapping.columns:
            if hasattr(values.get(name), "__clause_element__") or isinstance(values.get(name), sa.ClauseElement):
                raise Rejected(
                    f"{self._key!r} was not saved: an operation has assigned the SQL expression {values[name]!r} to "
                    f"{name}, but must assign a value"
                )

    def _touch(self) -> None:
        """Where nobody is kept out by a lock, have the row changed too when only something beside it is.

        Else another process that has loaded the same would not notice.
        """
        mapping, session = self._mapping, self._session
        if mapping.locking or self._identity is None or self._resource not in session:
            return
        if self._resource in session.deleted or session.is_modified(self._resource, include_collections=False):
            return
        counted = (*mapping.mapper.primary_key, mapping.mapper.version_id_col)
        others = (
            name
            for name, column in mapping.columns.items()
            if not any(column is one for one in counted) and getattr(column, "computed", None) is None
        )
        name = mapping.version or next(others, None)
        if name is not None:
            getattr(self._resource, name)  # so that it is loaded
            flag_modified(self._resource, name)

    def _changes(self) -> bool:
        session = self._session
        return bool(session.new or session.deleted or any(session.is_modified(one) for one in session.dirty))

    def _look_again(self, rejected: Rejected) -> None:
        """When the row that was to be inserted is there by now, another process was faster: that is a `Conflict`.

        So it is where nobody can look: the replay will see.
        """
        cause = rejected.__cause__
        if self._identity is None and isinstance(cause, IntegrityError) and _sql.is_duplicate(cause):
            mapping = self._mapping
            there: object = True
            with suppress(DBAPIError), mapping.engine.connect() as connection:
                there = connection.execute(mapping.look, mapping.parameters(self._key)).first()
            if there is not None:
                raise Conflict(f"{self._key!r} was not saved: somebody else has inserted it meanwhile") from cause

    def _end(self, error: BaseException | None) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        try:
            if transaction is not None:
                transaction.end(error)
        finally:
            self._close_session()

    def _close_session(self) -> None:
        session = self.__dict__.pop("_session", None)
        if session is not None:
            session.close()


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    """Of those that can change in place."""
    return {name: deepcopy(value) for name, value in values.items() if isinstance(value, (list, dict, set, bytearray))}


# -- what a store is made of -----------------------------------------------------------------------------------


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
    return cast("MappedScope", session.info[_SCOPE])


def refuse_joined(mapper: Mapper[Any]) -> None:
    """Refuse a class some of whose rows have columns in other tables, which nobody would lock or compare."""
    for one in mapper.self_and_descendants:
        if one.local_table is not mapper.local_table:
            raise ValueError(
                f"{mapper.class_.__name__} has a subclass in a table of its own, {one.class_.__name__}, whose columns "
                "would be neither locked nor compared: give that class a store"
            )


def key_attributes(mapper: Mapper[Any], by: str | None) -> tuple[InstrumentedAttribute[Any], ...]:
    """The attributes that a key stands for: those of the primary key, or one that is unique."""
    if by is None:
        return tuple(_attribute(mapper, mapper.get_property_by_column(column).key) for column in mapper.primary_key)
    attribute = _attribute(mapper, by)
    column = _column(attribute)
    if not _is_unique(column):
        raise ValueError(
            f"by={by!r}: the column {column} is not unique, so that it does not name one {mapper.class_.__name__}"
        )
    return (attribute,)


def version_attribute(mapper: Mapper[Any], version: str | None) -> str | None:
    """The attribute that the store counts up; None when there is none, or the mapper counts by itself."""
    if version is None:
        return None
    column = _column(_attribute(mapper, version))
    if mapper.version_id_col is not None:
        if mapper.version_id_col is not column:
            raise ValueError(f"version={version!r}: the mapper's version_id_col is {mapper.version_id_col}")
        return None
    if not issubclass(python_type(column) or int, int):
        raise ValueError(  # noqa: TRY004 - it is the value of *version* that is wrong
            f"version={version!r}: the column {column} is no whole number"
        )
    return version


def token_of(mapper: Mapper[Any], version: str | None, dialect: sa.Dialect) -> tuple[sa.ColumnElement[Any], ...]:
    """What tells whether a row was changed: its version, or PostgreSQL's xmin; nothing where there is neither."""
    if version is not None:
        return (_column(_attribute(mapper, version)),)
    if mapper.version_id_col is not None:
        return (mapper.version_id_col,)
    if dialect.name == "postgresql" and isinstance(mapper.local_table, sa.Table) and not mapper.inherits:
        name = dialect.identifier_preparer.quote(mapper.local_table.name)
        return (sa.cast(sa.literal_column(f"{name}.xmin"), sa.Text),)
    return ()


def python_type(column: sa.ColumnElement[Any]) -> type | None:
    """What values of *column* are in Python; None when its type does not say."""
    try:
        return column.type.python_type
    except NotImplementedError:
        return None


def _attribute(mapper: Mapper[Any], name: str) -> InstrumentedAttribute[Any]:
    if name not in mapper.column_attrs:
        raise ValueError(f"{mapper.class_.__name__} has no column attribute {name!r}")
    return cast("InstrumentedAttribute[Any]", getattr(mapper.class_, name))


def _column(attribute: InstrumentedAttribute[Any]) -> sa.Column[Any]:
    return cast("sa.Column[Any]", attribute.property.columns[0])


def _is_unique(column: sa.Column[Any]) -> bool:
    table = column.table
    indexes = [index.columns for index in table.indexes if index.unique]
    constraints = [
        constraint.columns
        for constraint in table.constraints
        if isinstance(constraint, (sa.UniqueConstraint, sa.PrimaryKeyConstraint))
    ]
    return bool(column.unique) or any(list(columns) == [column] for columns in (*indexes, *constraints))
