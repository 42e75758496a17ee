"""Code that saving a row runs and that nobody here knows: receivers of signals, methods of the model, triggers.

It may write any row. In a transaction that has loaded rows for others too, a save of these would write over that in
silence. So nothing that operations have not connected shares a transaction with such code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from django.db.models import Model
from django.db.models.signals import post_delete, post_save, pre_delete, pre_save

from geventbatch._core.clock import clock as _clock
from geventbatch._safe_repr import shown
from geventbatch._watch import log
from geventbatch.errors import Apart
from geventbatch.stores.django._model_save import has_own_save
from geventbatch.stores.django._query import own_tables
from geventbatch.stores.django._transaction import send

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch.errors import NotSaved
    from geventbatch.stores.django._part import Part

_TRUSTED: Final = 60.0
"""Seconds until the next look for triggers."""

_LOOK: Final = {
    "postgresql": (
        "WITH RECURSIVE tables (oid) AS (SELECT pg_catalog.to_regclass(%s)::oid UNION "
        "SELECT inhrelid FROM pg_catalog.pg_inherits JOIN tables ON inhparent = tables.oid) "
        "SELECT count(*) FROM pg_catalog.pg_class JOIN tables USING (oid) WHERE relhasrules OR EXISTS "
        "(SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = pg_class.oid AND NOT tgisinternal AND tgenabled <> 'D')"
    ),
    "sqlite": "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND lower(tbl_name) = lower(%s)",
    "mysql": (
        "SELECT count(*) FROM information_schema.triggers "
        "WHERE event_object_schema = DATABASE() AND lower(event_object_table) = lower(%s)"
    ),
}
"""By vendor: asks whether a table has triggers."""

_triggers: Final[dict[tuple[str, str], tuple[bool, float]]] = {}  # mutable
"""By database alias and table: whether it has triggers, and until which monotonic second that holds."""


def apart(parts: Iterable[Part], connection: BaseDatabaseWrapper) -> dict[Part, NotSaved]:
    """Return the `Apart` of each of *parts* that is to be saved in a transaction of its own. Switches: yes.

    One of them may be saved now if no others write.
    """
    writing = [part for part in parts if part.writes]
    if len(writing) < 2:  # noqa: PLR2004 - nothing shares the transaction
        return {}
    known: dict[tuple[type[Model], str], str | None] = {}

    def reason(model: type[Model], how: str) -> str | None:
        if (model, how) not in known:
            why = _of_model(model, how) or ("triggers" if _has_triggers(model, connection) else None)
            known[model, how] = why
            if why is not None:
                log.saved_apart(f"DjangoStore on {shown(connection.alias)}", model._meta.label, why)
        return known[model, how]

    found: dict[Part, NotSaved] = {}
    for part in writing:
        for model, how in part.written():
            why = reason(model, how)
            if why is not None:
                told = f"{shown(part.batch.key)} is saved in a transaction of its own: {model._meta.label} has {why}"
                found[part] = Apart(told)
                break
    if found and len(found) == len(writing):
        del found[next((part for part in writing if part.turn.wrote), writing[0])]
    return found


def _of_model(model: type[Model], how: str) -> str | None:
    """Return which code of Python's runs when a row of *model* is saved, deleted or (in bulk) added, if any."""
    meta: Any = model._meta
    if how == "add" and not meta.parents:  # by bulk_create
        return None
    if how == "delete":
        if pre_delete.has_listeners(model) or post_delete.has_listeners(model):
            return "receivers of signals"
        if model.delete is not Model.delete:
            return "a delete of its own"
        return "rows that refer to it" if meta.related_objects or meta.private_fields else None
    if pre_save.has_listeners(model) or post_save.has_listeners(model):
        return "receivers of signals"
    return "a save of its own" if has_own_save(model) else None


def _has_triggers(model: type[Model], connection: BaseDatabaseWrapper) -> bool:
    now = _clock.monotonic()
    for table in own_tables(model):
        found, until = _triggers.get((connection.alias, table), (False, 0.0))
        if now >= until:
            look = _LOOK.get(connection.vendor)
            name = connection.ops.quote_name(table) if connection.vendor == "postgresql" else table
            found = look is None or bool(send(connection, look, (name,)).fetchone()[0])
            _triggers[connection.alias, table] = found, now + _TRUSTED
        if found:
            return True
    return False
