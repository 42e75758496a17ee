"""Queries for a batch's row: a manager's query, without joins that cannot be locked or would be too old."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from django.db.models.expressions import Col

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.models import Model, QuerySet


def own_tables(model: type[Model]) -> list[str]:
    """Return the tables that have the columns of *model*: its own first, then its parents'."""
    names = [model._meta.db_table, *(field.model._meta.db_table for field in model._meta.concrete_fields)]
    return list(dict.fromkeys(names))


def whole_rows(rows: QuerySet[Any]) -> QuerySet[Any]:
    """Return the query for the same rows without order, with all their columns and nothing joined.

    A joined row would be as old as the start of the statement, which may wait long for its lock. An operation that uses
    a related row loads it then.
    """
    query = rows.query
    if query.select_related:
        rows = rows.select_related(None)
    if query.order_by or query.extra_order_by or (query.default_ordering and query.get_meta().ordering):
        rows = rows.order_by()
    if query.deferred_loading != (frozenset(), True):
        rows = rows.defer(None)
    return rows


def reads_beside(rows: QuerySet[Any]) -> bool:
    """Return whether *rows* depends on other tables: it cannot be locked then, or may read too old a state."""
    query: Any = rows.query
    if query.annotations or query.extra or query.distinct or query.group_by is not None or query.combinator:
        return True
    if not query.alias_map and not query.where.children:  # most managers: nothing is filtered
        return False
    tables = {join.table_name for join in query.alias_map.values()}
    return not tables <= set(own_tables(rows.model)) or any(_looks_beside(one) for one in _leaves(query.where))


def _leaves(node: Any) -> Iterator[Any]:
    for child in node.children:
        if hasattr(child, "children"):
            yield from _leaves(child)
        else:
            yield child


def _looks_beside(lookup: Any) -> bool:
    sides = (getattr(lookup, "lhs", None), getattr(lookup, "rhs", None))
    return not isinstance(sides[0], Col) or hasattr(sides[1], "as_sql")


def is_of_others(query: str, params: Any, instance: Model) -> bool:
    """Return whether *query* is Django's and leaves *instance* out: it names another key, or excludes this one."""
    if not isinstance(params, (tuple, list)) or " JOIN " in query or query.count("SELECT ") != 1:
        return False
    for named, pattern in zip((True, False), _of_key(type(instance)), strict=True):
        found = pattern.search(query)
        place = -1 if found is None else query.count("%s", 0, found.start("value"))
        if 0 <= place < len(params):
            return (params[place] != instance.pk) is named
    return False


@cache
def _of_key(model: type[Model]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return two patterns for a WHERE: it names one primary key and nothing else; it excludes one."""
    table, column = re.escape(model._meta.db_table), re.escape(str(getattr(model._meta.pk, "column", None)))
    equal = rf"[\"`]{table}[\"`]\.[\"`]{column}[\"`] = (?P<value>%s)"
    return (
        re.compile(rf" WHERE {equal}(?: ORDER BY [^()]+)?(?: LIMIT \d+)?(?: FOR [A-Z ]+)?$"),
        re.compile(rf"NOT \({equal}\)\)"),
    )
