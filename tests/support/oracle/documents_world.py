"""What documents have for the judge: a table of texts, or Redis, and the stores. Failing programs have it in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from geventbatch import ResourceMissing
from geventbatch.stores import RedisStore, Reuse, SQLAlchemyStore
from tests.support.oracle.judge import Alone, frozen, transaction_of_one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class DocumentWorld:
    """A table of documents, and one beside it."""

    atomic_foreign = False

    def __init__(
        self,
        engine: sa.Engine,
        other: sa.Engine,
        model: dict[str, Any],
        *,
        mode: Any = None,
        pipeline: bool = True,
        reuse: bool = False,
        bulk: bool = False,
    ) -> None:
        self.engine = engine
        self.other = other
        self.model = model
        self.keys = model["KEYS"]
        self.key = self.keys[0]
        self.bulk = bulk
        self.ordered = model["ORDERED"]
        self.atomic_foreign = mode != "version" and engine.dialect.name != "sqlite"
        self._table = model["documents"]
        self._store: Any = SQLAlchemyStore.documents(
            engine,
            self._table.name,
            metadata=self._table.metadata,
            encode=model["encode"],
            decode=model["decode"],
            mode=mode,
            pipeline=pipeline,
            key_type=model["KEY_TYPE"],
            state_type=model["STATE_TYPE"],
            reuse_resource=Reuse() if reuse else None,
        )

    def store(self) -> Any:
        """What a processor takes."""
        return self._store

    def fill(self) -> None:
        """Have the rows that a trial begins with, and no others."""
        self._store.stopped()  # what was kept is of another trial
        state = self.model["encode"](self.model["first"]())
        rows = [{"key": key, "state": state, "version": 1} for key in self.keys]
        with self.other.begin() as connection:
            connection.execute(sa.delete(self.model["Other"]))
            connection.execute(sa.delete(self._table))
            connection.execute(sa.insert(self._table), rows)

    def foreign(self, write: Callable[[Any], object], at: int = 0) -> None:
        """Have somebody else write, by another connection."""
        key = self.keys[at]
        with self.other.begin() as connection:
            found = connection.execute(self._find(key, lock=True)).first()
            if found is not None:
                resource = self.model["decode"](found[0])
                write(resource)
                self._write(connection, key, resource)

    def alone(self, operations: Sequence[Any]) -> Alone:
        """What comes of these, in one transaction."""
        found = Alone()
        try:
            with self.engine.begin() as connection, transaction_of_one() as (rows, deleted):
                for operation in operations:
                    resources = {self.keys[one]: self._found(connection, self.keys[one]) for one in operation.at}
                    found.answers.append(frozen(operation(*resources.values()), ordered=self.ordered))
                    for place, (key, resource) in enumerate(resources.items()):
                        if place in deleted:
                            connection.execute(sa.delete(self._table).where(self._table.c.key == key))
                        else:
                            self._write(connection, key, resource)
                    deleted.clear()
                for row in rows:
                    _insert(connection, row)
        except Exception as error:
            found.fail(error, len(operations))
        return found

    def rows(self) -> dict[str, list[Any]]:
        """All rows of all tables, frozen, without what counts saves."""
        with self.other.connect() as connection:
            documents = [
                frozen(self.model["decode"](state), ordered=self.ordered)
                for state in connection.scalars(sa.select(self._table.c.state).order_by(self._table.c.key))
            ]
            others = connection.execute(sa.select(self.model["Other"].c.text, self.model["Other"].c.m)).all()
        return {"documents": documents, "other": sorted((frozen(tuple(row)) for row in others), key=repr)}

    def _find(self, key: Any, *, lock: bool = False) -> sa.Select[Any]:
        found = sa.select(self._table.c.state).where(self._table.c.key == key)
        return found.with_for_update() if lock else found

    def _found(self, connection: sa.Connection, key: Any) -> Any:
        row = connection.execute(self._find(key)).first()
        if row is None:
            raise ResourceMissing("there is none", key=key)
        return self.model["decode"](row[0])

    def _write(self, connection: sa.Connection, key: Any, resource: Any) -> None:
        values = {"state": self.model["encode"](resource), "version": self._table.c.version + 1}
        connection.execute(sa.update(self._table).where(self._table.c.key == key).values(values))


def _insert(connection: sa.Connection, row: Any) -> None:
    if isinstance(row, tuple):
        connection.execute(sa.insert(row[0]), [row[1]])
    else:
        connection.execute(row)


class RedisWorld:
    """A prefix of a Redis server."""

    atomic_foreign = False

    def __init__(
        self, client: Any, other: Any, model: dict[str, Any], *, reuse: bool = False, bulk: bool = False
    ) -> None:
        self.other = other
        self.model = model
        self.keys = model["KEYS"]
        self.key = self.keys[0]
        self.bulk = bulk
        self.ordered = model["ORDERED"]
        self._prefix = model["PREFIX"]
        self._store: Any = RedisStore(
            client,
            prefix=self._prefix,
            encode=model["encode"],
            decode=model["decode"],
            reuse_resource=Reuse() if reuse else None,
        )

    def store(self) -> Any:
        """What a processor takes."""
        return self._store

    def fill(self) -> None:
        """Have the documents that a trial begins with."""
        self._store.stopped()
        state = self.model["encode"](self.model["first"]())
        for key in self.keys:
            self.other.delete(self._name(key))
        self._write(dict.fromkeys(self.keys, state))

    def foreign(self, write: Callable[[Any], object], at: int = 0) -> None:
        """Have somebody else write, who loses no save that comes between: other keys' batches run meanwhile."""
        name = self._name(self.keys[at])

        def change(pipeline: Any) -> None:
            found = pipeline.hget(name, "value")
            pipeline.multi()
            if found is not None:
                resource = self.model["decode"](found)
                write(resource)
                pipeline.hset(name, "value", self.model["encode"](resource))
                pipeline.hincrby(name, "version", 1)

        self.other.transaction(change, name)

    def alone(self, operations: Sequence[Any]) -> Alone:
        """What comes of these, in one transaction."""
        found = Alone()
        states: dict[Any, Any] = {}
        try:
            with transaction_of_one() as (_, deleted):
                for operation in operations:
                    resources = {self.keys[one]: self._found(self.keys[one], states) for one in operation.at}
                    found.answers.append(frozen(operation(*resources.values()), ordered=self.ordered))
                    for place, (key, resource) in enumerate(resources.items()):
                        states[key] = None if place in deleted else self.model["encode"](resource)
                    deleted.clear()
            self._write(states)
        except Exception as error:
            found.fail(error, len(operations))
        return found

    def rows(self) -> dict[str, list[Any]]:
        """What is there, frozen."""
        found = [self.other.hget(self._name(key), "value") for key in self.keys]
        return {
            "documents": [
                None if value is None else frozen(self.model["decode"](value), ordered=self.ordered) for value in found
            ]
        }

    def _name(self, key: Any) -> str:
        return f"{self._prefix}{key}"

    def _found(self, key: Any, states: dict[Any, Any]) -> Any:
        found = states[key] if key in states else self.other.hget(self._name(key), "value")
        if found is None:
            raise ResourceMissing("there is none", key=key)
        return self.model["decode"](found)

    def _write(self, states: dict[Any, Any]) -> None:
        pipeline = self.other.pipeline(transaction=True)
        for key, state in states.items():
            if state is None:
                pipeline.delete(self._name(key))
            else:
                pipeline.hset(self._name(key), "value", state)
                pipeline.hincrby(self._name(key), "version", 1)
        pipeline.execute()
