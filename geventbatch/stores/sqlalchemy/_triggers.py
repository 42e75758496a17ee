"""Which tables have triggers, which may write other batches' rows: what the session of such a batch holds is outdated.

The database's catalogue is asked once. A listener of the user's that sends an UPDATE as a flush runs is like a trigger
on the tables that the flush writes. It is noticed by the first one.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.sql.dml import Delete, Insert

from geventbatch._safe_repr import shown
from geventbatch.errors import Apart
from geventbatch.stores.sqlalchemy._added_rows import is_instance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from geventbatch.stores.sqlalchemy._mapped_part import MappedPart

_log: Final = logging.getLogger("geventbatch")

_POSTGRESQL: Final = """
WITH RECURSIVE above (below, oid) AS (
SELECT inhrelid, inhparent FROM pg_catalog.pg_inherits
UNION SELECT d.refobjid, r.ev_class FROM pg_catalog.pg_rewrite AS r JOIN pg_catalog.pg_depend AS d
ON d.objid = r.oid AND d.classid = CAST('pg_catalog.pg_rewrite' AS regclass)
AND d.refclassid = CAST('pg_catalog.pg_class' AS regclass) WHERE r.rulename = '_RETURN' AND r.ev_class >= 16384
), found (oid) AS (
SELECT tgrelid FROM pg_catalog.pg_trigger WHERE NOT tgisinternal
UNION SELECT ev_class FROM pg_catalog.pg_rewrite WHERE rulename <> '_RETURN' AND ev_class >= 16384
UNION SELECT above.oid FROM above JOIN found ON found.oid = above.below
) SELECT DISTINCT c.relname FROM found JOIN pg_catalog.pg_class AS c ON c.oid = found.oid
"""
"""Tables with triggers or rules; what they are a part of; and views of them. (Oids below 16384 are the system's.)"""

_SQLITE: Final = (
    "SELECT tbl_name FROM sqlite_master WHERE type = 'trigger' "
    "UNION SELECT tbl_name FROM sqlite_temp_master WHERE type = 'trigger'"
)

_MYSQL: Final = (
    "SELECT event_object_table FROM information_schema.triggers UNION SELECT table_name FROM information_schema.views "
    "WHERE EXISTS (SELECT 1 FROM information_schema.triggers) AND table_schema NOT IN ('sys', 'information_schema')"
)
"""Tables with triggers, as far as the user may see them; if there are any, views too, which may be of them."""

_LOOKS: Final = {"postgresql": _POSTGRESQL, "sqlite": _SQLITE, "mysql": _MYSQL, "mariadb": _MYSQL}


class Triggers:
    """The tables of a store's database that have triggers, by name: a tenant's schema may have any name."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _names: set[str] | None  # lower case; None: nobody has asked yet
    _told: set[str]  # logged

    def __init__(self) -> None:
        """Ask when it is needed first."""
        self._names = None
        self._told = set()

    def apart(self, parts: Sequence[MappedPart], connection: sa.Connection) -> dict[MappedPart, Exception]:
        """Return those of *parts* that may fire a trigger, and so share no transaction. Switches: yes."""
        if len(parts) < 2:  # noqa: PLR2004 - there are no others
            return {}
        if self._names is None:
            look = _LOOKS.get(connection.dialect.name)
            found = () if look is None else connection.execute(sa.text(look)).scalars()
            self._names = {name.lower() for name in found}
        fire = {part: name for part in parts if (name := self._fired_by(part, self._names)) is not None}
        if len(fire) == len(parts):
            fire.pop(parts[0])
        return {part: self._apart(part, name) for part, name in fire.items()}

    def check(self, part: MappedPart, written: Iterable[Any]) -> None:
        """Raise `Apart` if the flush of *part*, beside others, has fired a trigger, or has called what has written."""
        names = self._names or set()
        if part.guard.called_what_writes:
            tables = _tables_of(part)
            names |= tables or set()
            raise self._apart(part, next(iter(tables or ("?",))))
        for table, _ in written:
            if names and str(table.name).lower() in names:
                raise self._apart(part, str(table.name).lower())

    def _fired_by(self, part: MappedPart, names: set[str]) -> str | None:
        if not names:
            return "" if any(_may_update(row) for row in part.rows) else None
        tables = _tables_of(part)
        return next(iter(names if tables is None else tables & names), None)

    def _apart(self, part: MappedPart, name: str) -> Apart:
        if name and name not in self._told:
            self._told.add(name)
            _log.info(
                "the table %s has a trigger, or a listener that sends statements: a batch that writes it is saved in a "
                "transaction without other batches, also by run_across and open_resources, which costs the time of one "
                "for each",
                name,
            )
        told = f"{shown(part.key)} was not saved, nothing was written: what it writes may fire a trigger"
        return Apart(f"{told}; it is applied again, in a transaction of its own", keys=part.keys)


def sent_by_flush(context: Any) -> bool:
    """Return whether a statement is of SQLAlchemy's own flush, or cannot change a row that another batch holds."""
    if context.compiled is None:
        return False
    statement = context.compiled.statement
    if isinstance(statement, Delete):
        return True  # who changes the row then does not find it
    return (
        not _may_update(statement) if isinstance(statement, Insert) else "compiled_cache" in context.execution_options
    )


def _may_update(row: object) -> bool:
    return isinstance(row, Insert) and getattr(row, "_post_values_clause", None) is not None


def _tables_of(part: MappedPart) -> set[str] | None:
    """Return the names, in lower case, of the tables that the flush of *part* is to write. None: any, by cascades."""
    session = part.guard.session
    if part.deletes or session.deleted or any(_may_update(row) for row in part.rows):
        return None
    states = [instance_state(one) for one in (*session.new, *session.dirty, *[one.resource for one in part.loaded])]
    tables: set[Any] = set()
    for row in part.rows:
        if is_instance(row):
            states.append(instance_state(row))
        else:
            pair: Any = row
            table: Any = row.table if isinstance(row, Insert) else pair[0]
            tables.add(getattr(table, "__table__", table))
    for mapper in {state.mapper for state in (*states, *part.beside())}:
        tables.update(mapper.tables)
        tables.update(relation.secondary for relation in mapper.relationships if relation.secondary is not None)
    return {str(table.name).lower() for table in tables if getattr(table, "name", None)}
