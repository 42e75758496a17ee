"""Return values of operations that are no plain values: a relationship's collection, or a query."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Query, WriteOnlyCollection
from sqlalchemy.orm.collections import CollectionAdapter

_PROXIES: Final = "sqlalchemy.ext.associationproxy"
_ASKING: Final = (Query, WriteOnlyCollection, sa.Result, sa.ScalarResult)


def is_collection(value: object) -> bool:
    """Return whether *value* is a live view of a relationship: its collection, or an association proxy's."""
    if type(value).__module__ == _PROXIES:
        return True
    return isinstance(getattr(value, "_sa_adapter", None), CollectionAdapter)  # other objects may have any attribute


def plain(value: Any) -> Any:
    """Return the collection *value* as a list, set or dict; itself if its class is the user's own."""
    if type(value).__module__.partition(".")[0] != "sqlalchemy":
        return value  # it may have methods that the caller uses
    if isinstance(value, MutableSequence):
        return list(value)
    if isinstance(value, MutableMapping):
        return dict(value)
    return set(value) if isinstance(value, MutableSet) else value


def asks_later(value: object) -> bool:
    """Return whether *value* queries the database only when it is read."""
    return isinstance(value, _ASKING)
