"""Statements sent to PostgreSQL as one message, with their values in them, and as many rows. Imports no vendor.

If a statement fails, PostgreSQL skips all later ones of the message, COMMIT too. So one that finds another number of
rows than it has to is sent in a form that fails then.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.abc import Transformer

_PLACE: Final = re.compile(r"%(?:\((\w+)\)s|%)")
_NAMED: Final = re.compile(r"(?<!%)(?:%%)*%\((\w+)\)s")
_ANY: Final = re.compile(r"(?<!%)(?:%%)*%(?!%)")

_CHECKED: Final = (
    "WITH changed AS (%s\n) SELECT CASE count(*) WHEN %d THEN 1 "
    "ELSE CAST(count(*) || ' %s' AS integer) END FROM changed"
)


def checked(statement: str, rows: int, mark: str = errors.MARK) -> str:
    """Return a statement that fails, by a text that is no number, unless *statement* returns exactly so many *rows*.

    The text has *mark* in it, which begins with `errors.MARK`.
    """
    return _CHECKED % (statement, rows, mark)


class Text:
    """A compiled statement.

    Args:
        query: As the driver would get it, with its places as ``%(name)s``.
        binders: By name, what prepares a value for the driver; None: nothing does.
    """

    def __init__(self, query: str, binders: dict[str, Callable[[Any], Any] | None]) -> None:
        self._query = query
        self._binders = binders
        pieces, names = [""], []
        end = 0
        for place in _PLACE.finditer(query):
            pieces[-1] += query[end : place.start()]
            end = place.end()
            if place[1] is None:
                pieces[-1] += "%"
            else:
                names.append(place[1])
                pieces.append("")
        pieces[-1] += query[end:]
        self.places: Final = len(names)
        self._first = pieces[0]
        self._places: list[tuple[str, Callable[[Any], Any] | None, str]] = [
            (name, binders[name], piece) for name, piece in zip(names, pieces[1:], strict=True)
        ]

    def changing(self, rows: int) -> Text:
        """Return a text that fails unless the statement changes exactly so many *rows*."""
        return Text(checked(f"{self._query}\n RETURNING 1", rows), self._binders)

    def of(self, parameters: dict[str, Any], transformer: Transformer) -> str | None:
        """Return the statement with its values; None if only a cursor can tell how, or what is wrong."""
        whole = [self._first]
        try:
            for name, bind, piece in self._places:
                value = parameters[name]
                if bind is not None:
                    value = bind(value)
                if isinstance(value, float):  # a bare number would be a decimal
                    return None
                whole += (transformer.as_literal(value).decode(transformer.encoding), piece)
        except Exception:
            return None
        return "".join(whole)


@lru_cache(1000)
def named(query: str) -> Text | None:
    """Return the text of a *query* for values that are ready; None if it has other places than ``%(name)s``."""
    text = Text(query, dict.fromkeys(_NAMED.findall(query)))
    return text if len(_ANY.findall(query)) == text.places else None


def insert_of_a_row(query: str) -> tuple[str, str] | None:
    """Return an INSERT of one row as the text before the row's values, and these; None for any other statement.

    The server reads, plans and answers many rows in one statement much faster than as many statements.
    """
    head, values_begin, values = query.partition(" VALUES (")
    if not values_begin or not head.startswith("INSERT INTO ") or "'" in values or '"' in values:
        return None
    depth = 1
    for left, one in enumerate(values, 1 - len(values)):
        depth += (one == "(") - (one == ")")
        if not depth:  # what is behind the values would be said of each row
            return None if left else (f"{head} VALUES ", f"({values}")
    return None
