"""The text of operations' statements: whether one writes, and to which tables."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

from geventbatch.stores._sql import statements
from geventbatch.stores._sql.functions import Functions

if TYPE_CHECKING:
    from collections.abc import Hashable

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Model

_READS: Final = frozenset(
    {
        *(
            "CLOSE",
            "DESC",
            "DESCRIBE",
            "EXPLAIN",
            "FETCH",
            "MOVE",
            "PRAGMA",
            "SELECT",
            "SHOW",
            "TABLE",
            "VALUES",
            "WITH",
        ),
        *("BEGIN", "COMMIT", "RELEASE", "ROLLBACK", "SAVEPOINT", "SET", "START"),  # no rows
    }
)
_WRITES: Final = re.compile(r"\b(?:(?<!for )(?<!key )update|insert|delete|merge|replace|into|analyze)\b", re.IGNORECASE)


def writes(statement: str) -> bool:
    """Return whether *statement* may change a row, judged by its text. A literal may count by mistake."""
    word = statements.first_word(statement)
    if word == "SELECT":
        return " into " in statement.lower()
    return word not in _READS or _WRITES.search(statement) is not None


@cache
def tables_of(model: Hashable) -> re.Pattern[str]:
    """Return a pattern for the names of the tables of *model*. Switches: no."""
    models: list[Any] = [model, *cast("type[Model]", model)._meta.get_parent_list()]
    names = {one._meta.db_table.rpartition(".")[2].strip('"`') for one in models}
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(names)))})(?!\w)", re.IGNORECASE)


_functions: Final[dict[tuple[str, str], Functions]] = {}


def functions_of(connection: BaseDatabaseWrapper) -> Functions:
    """Return the known functions of the database of *connection*. Switches: no."""
    place = connection.alias, connection.vendor
    found = _functions.get(place)
    if found is None:
        found = _functions[place] = Functions(connection.vendor)
    return found
