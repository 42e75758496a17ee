"""What SQLAlchemy has for the judge: a plain session, the store of mapped classes. Failing programs have it in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.attributes import flag_modified

from geventbatch import ResourceMissing
from geventbatch.stores import SQLAlchemyStore
from tests.support.oracle.judge import Alone, frozen, transaction_of_one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.orm import InstanceState


class PlainSession(Session):
    """An application's own, which says what it has changed in place, and that only."""

    def flush(self, objects: Any = None) -> None:
        """Tell SQLAlchemy first of what was changed in place."""
        for instance in self.identity_map.values():
            state: InstanceState[Any] = sa.inspect(instance)
            names = self.info["mutable"].get(type(instance).__name__, ())
            loaded = [name for name in names if state.dict.get(name) is not None]
            there = self._there(state, loaded)
            for name in loaded:
                if name not in there or frozen(state.dict[name]) != frozen(there[name]):
                    flag_modified(instance, name)
        super().flush(objects)

    def _there(self, state: InstanceState[Any], names: list[str]) -> dict[str, Any]:
        """What the database has in its attributes *names*."""
        if not names or not self.is_active:
            return {}
        table = [state.mapper.columns[name] for name in names]
        key = zip(state.mapper.primary_key, state.identity or (), strict=True)
        found = self.connection().execute(sa.select(*table).where(*[column == value for column, value in key])).first()
        return {} if found is None else dict(zip(names, found, strict=True))


class MappedWorld:
    """A model, as its source has made it, in one database."""

    def __init__(
        self,
        engine: sa.Engine,
        other: sa.Engine,
        model: dict[str, Any],
        *,
        mode: Any = None,
        pipeline: bool = True,
        session: dict[str, Any] | None = None,
        bulk: bool = False,
    ) -> None:
        self.engine = engine
        self.other = other
        self.model = model
        self.key = model["KEY"]
        self.keys = model["KEYS"]
        self.bulk = bulk
        self.ordered = model["ORDERED"]
        self.atomic_foreign = mode != "version" and engine.dialect.name != "sqlite"
        self._maker = sessionmaker(engine, **(session or {}))
        self._store = SQLAlchemyStore.mapped(
            self._maker if session else engine,
            model["Thing"],
            by=model["BY"],
            version=model["VERSION"],
            mode=mode,
            pipeline=pipeline,
        )

    def store(self) -> Any:
        """What a processor takes."""
        return self._store

    def fill(self) -> None:
        """Have the rows that a trial begins with, and no others."""
        with Session(self.other) as session:
            for table in reversed(self._tables()):
                session.execute(sa.delete(table))
            self.model["fill"](session)
            session.flush()
            for table in self._tables():
                if table.name.endswith("log"):  # what the triggers have written meanwhile
                    session.execute(sa.delete(table))
            session.commit()

    def foreign(self, write: Callable[[Any], object], at: int = 0) -> None:
        """Have somebody else write, by another connection."""
        with self._plain(self.other) as session:
            thing = self.model["Thing"]
            resource = session.scalars(self._find(at).with_for_update(of=thing)).unique().one_or_none()
            if resource is not None:
                write(resource)
            session.commit()

    def alone(self, operations: Sequence[Any]) -> Alone:
        """What comes of these, in one transaction by a plain session."""
        found = Alone()
        try:
            with self._plain(self.engine) as session, transaction_of_one() as (rows, deleted):
                for operation in operations:
                    resources = [self._found(session, at) for at in operation.at]
                    found.answers.append(frozen(operation(*resources), ordered=self.ordered))
                    if deleted:
                        if session.new:
                            session.flush()  # so that what it has added is deleted with it
                        for place in deleted:
                            session.delete(resources[place])
                        deleted.clear()
                        session.flush()
                session.flush()
                self._insert(session, rows)
                session.commit()
        except Exception as error:
            found.fail(error, len(operations))
        return found

    def _find(self, at: int) -> sa.Select[Any]:
        found: sa.Select[Any] = (
            self.model["find_at"](self.keys[at]) if "find_at" in self.model else self.model["find"]()
        )
        return found

    def _found(self, session: Session, at: int) -> Any:
        if session.autoflush:
            session.flush()
        with session.no_autoflush:  # `PlainSession` would write what is just being loaded
            resource = session.scalars(self._find(at)).unique().one_or_none()
        if resource is None:
            raise ResourceMissing("there is none", key=self.keys[at])
        return resource

    def rows(self) -> dict[str, list[Any]]:
        """All rows of all tables, frozen, without what counts or stamps saves."""
        found: dict[str, list[Any]] = {}
        with self.other.connect() as connection:
            for table in self._tables():
                if not table.name.endswith("log"):  # what triggers write
                    found[table.name] = self._rows(connection, table)
        return found

    def _rows(self, connection: sa.Connection, table: sa.Table) -> list[Any]:
        ignored = self.model["IGNORED"]
        columns = [column for column in table.columns if column.name not in ignored]
        ranked = table.name.endswith(("child", "other"))  # whose ids are a sequence's
        query = sa.select(*columns).order_by(*table.primary_key)
        try:
            rows = [tuple(row) for row in connection.execute(query)]
        except Exception:  # what is there is not of the column's type
            connection.rollback()
            raw = [sa.type_coerce(column, sa.types.NullType()) for column in columns]
            rows = [tuple(row) for row in connection.execute(sa.select(*raw).order_by(*table.primary_key))]
        shown = [frozen(list(row[1:] if ranked else row), ordered=self.ordered) for row in rows]
        return sorted(shown, key=repr) if table.name.endswith("other") else shown

    def _insert(self, session: Session, rows: Sequence[Any]) -> None:
        for row in rows:
            if isinstance(row, tuple):
                table: Any = getattr(row[0], "__table__", row[0])
                session.connection().execute(sa.insert(table), [row[1]])
            elif isinstance(row, sa.Insert):
                session.execute(row)
            else:
                session.add(row)
        session.flush()

    def _plain(self, engine: sa.Engine) -> PlainSession:
        options = {name: value for name, value in self._maker.kw.items() if name not in {"bind", "class_", "info"}}
        if engine.dialect.name == "sqlite":
            options["autoflush"] = False  # there, an operation's queries do not find what it has changed itself
        return PlainSession(engine, info={"mutable": self.model["MUTABLE"]}, **options)

    def _tables(self) -> list[sa.Table]:
        tables: list[sa.Table] = self.model["Base"].metadata.sorted_tables
        return tables
