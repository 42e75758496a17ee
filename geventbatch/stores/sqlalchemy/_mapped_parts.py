"""Puts a store of mapped classes together: of one class, or of several by name."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from functools import partial
from typing import TYPE_CHECKING, Any

from geventbatch._check_callables import check_functions
from geventbatch._safe_repr import shown
from geventbatch.stores._missing import checked
from geventbatch.stores._sql.keys import hint_of_several, normalize_all
from geventbatch.stores.sqlalchemy._batch_connection import BatchConnection
from geventbatch.stores.sqlalchemy._change_tracker import track_loads
from geventbatch.stores.sqlalchemy._key_columns import key_column
from geventbatch.stores.sqlalchemy._mapped_bulk import BulkMapped
from geventbatch.stores.sqlalchemy._mapped_scope import MappedScope
from geventbatch.stores.sqlalchemy._mapping import (
    Mapping,
    key_attributes,
    mapper_of,
    refuse_joined,
    token_of,
    version_attribute,
)
from geventbatch.stores.sqlalchemy._mode import mode_of
from geventbatch.stores.sqlalchemy._outcome_table import outcome_table
from geventbatch.stores.sqlalchemy._parts import Parts
from geventbatch.stores.sqlalchemy._session import session_factory
from geventbatch.stores.sqlalchemy._tenants import prepared
from geventbatch.stores.sqlalchemy._transaction import transaction_class

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import sqlalchemy as sa
    from sqlalchemy.orm import Mapper

    from geventbatch.stores.sqlalchemy._mode import Mode


def mapped_parts(  # noqa: PLR0913 - the options of `SQLAlchemyStore.mapped`
    bind: Any,
    entity: Any,
    *,
    by: Any,
    version: Any,
    mode: Mode | None,
    missing: Any,
    pipeline: bool,
    tenant: Callable[[], Hashable] | None,
    prepare_connection: Callable[[sa.Connection, Any], object] | None,
    idempotency: sa.Table | None,
    idempotency_ttl: float | None,
) -> Parts[Any]:
    """Return the parts of what `SQLAlchemyStore.mapped` makes."""
    models = _models(entity)
    by, version, missing = (_options(models, *one) for one in (("by", by), ("version", version), ("missing", missing)))
    makes = {name: checked(missing.get(name, "raise"), rows=True) for name in models}
    engine, sessions = session_factory(bind, next(iter(models.values())))
    for mapper in models.values():
        _check_engine(bind, mapper, engine)
    chosen = mode_of(engine, mode)
    if tenant is not None and prepare_connection is None:
        raise ValueError("tenant is given, but the batch's connection finds its tables by prepare_connection only")
    check_functions(("connection", "key"), prepare_connection=prepare_connection)
    begin = transaction_class(engine, pipeline=pipeline, locking=chosen == "lock")
    outcomes = outcome_table(idempotency, engine, idempotency_ttl)
    mappings: dict[Any, Mapping] = {}
    for rank, (name, mapper) in enumerate(models.items()):
        refuse_joined(mapper)
        mappings[name] = Mapping(
            engine=engine,
            sessions=sessions,
            transaction=prepared(begin, prepare_connection),
            mapper=mapper,
            by=key_attributes(mapper, by.get(name)),
            missing=makes[name],
            locking=chosen == "lock",
            version=version_attribute(mapper, version.get(name)),
            counts_itself=mapper.version_id_col is not None,
            token=() if chosen == "lock" else token_of(mapper, engine.dialect),
            outcomes=outcomes,
            prepare=prepare_connection,
            has_tenants=tenant is not None,
            model=name,
            rank=rank,
            mappers=tuple(models.values()),
        )
    first = next(iter(mappings.values()))
    track_loads(sessions, first)
    BatchConnection.watch(engine)
    columns = {
        name: [key_column(one.property.columns[0], engine.dialect) for one in mapping.by]
        for name, mapping in mappings.items()
    }
    if None in mappings:
        open_scope: Any = partial(MappedScope, first)
        mapping_of: Callable[[Any], Mapping] = lambda _: first  # noqa: E731 - one of two
        normalized: Callable[[Any], Hashable] = partial(normalize_all, columns=columns[None])
    else:
        mapping_of = partial(_mapping_of, mappings, has_tenants=tenant is not None)
        open_scope = lambda key: MappedScope(mapping_of(key), key)  # noqa: E731 - one of two
        normalized = partial(_normalized, columns)
    tables: Any = [mapping.mapper.local_table for mapping in mappings.values()]
    return Parts(
        open_scope=open_scope,
        engine=engine,
        table=tables[0],
        tables=tables,
        normalized=normalized,
        mode=chosen,
        idempotency=idempotency,
        outcomes=outcomes,
        bulk=None if prepare_connection is not None else BulkMapped(mapping_of, list(mappings.values()), normalized),
        tenant=tenant,
    )


def _models(entity: Any) -> dict[Any, Mapper[Any]]:
    """Return the mapper of each class by its name; of one class, by None."""
    if not isinstance(entity, Dict):
        return {None: mapper_of(entity)}
    if not entity:
        raise ValueError("entity is an empty dict: name at least one class")
    for name in entity:
        if not isinstance(name, str):
            raise TypeError(f"entity has the name {shown(name)}, but must have strings as names of classes")
    return {name: mapper_of(one) for name, one in entity.items()}


def _options(models: dict[Any, Mapper[Any]], what: str, given: Any) -> Dict[Any, Any]:
    """Return the option *what* by the name of each class that has it."""
    if None in models:
        return {None: given}
    if given is None or (what == "missing" and given == "raise"):
        return {}
    if not isinstance(given, Dict):
        raise TypeError(f"{what}={shown(given)}: of several classes, pass a dict of their names")
    for name in given:
        if name not in models:
            raise ValueError(f"{what} has the name {shown(name)}, but the classes are {', '.join(map(shown, models))}")
    return given


def _check_engine(bind: Any, mapper: Mapper[Any], engine: sa.Engine) -> None:
    if session_factory(bind, mapper)[0] is not engine:
        raise ValueError(f"{mapper.class_.__name__} is in another database: a transaction is in one")


def _mapping_of(mappings: dict[Any, Mapping], key: Any, *, has_tenants: bool) -> Mapping:
    return mappings[key[1][0] if has_tenants else key[0]]


def _normalized(columns: dict[Any, Any], key: Any) -> Hashable:
    """Return the form of *key*, a pair of the name of a class and the row's own key."""
    if not isinstance(key, (tuple, list)) or len(key) != 2:  # noqa: PLR2004 - a pair
        names = [*map(shown, columns)]
        raise TypeError(
            f"the key {shown(key)} must be a pair of a name, {' or '.join(names)}, and the key of a row, as "
            f"({names[0]}, 12){hint_of_several(key, columns)}"
        )
    name, own = key
    if not isinstance(name, str) or name not in columns:
        raise ValueError(
            f"the key {shown(key)} names no class of the store: it has {', '.join(map(shown, columns))}"
            f"{hint_of_several(key, columns)}"
        )
    return name, normalize_all(own, columns[name])
