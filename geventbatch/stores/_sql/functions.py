"""Server-side functions that a query calls: each may write, which the query's text does not tell."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from geventbatch.stores._sql.statements import ends_transaction

if TYPE_CHECKING:
    from collections.abc import Callable

_CALLED: Final = re.compile(r"\b([a-z_]\w*)[\"`]?\s*\(", re.IGNORECASE)
_REMEMBERED: Final = 1_000

_OWN: Final = {
    "postgresql": (
        "SELECT DISTINCT lower(proname) FROM pg_proc WHERE lower(proname) = ANY(string_to_array(%s, ',')) "
        "AND provolatile = 'v' AND pronamespace <> 'pg_catalog'::regnamespace"
    ),
    "mysql": (
        "SELECT DISTINCT lower(routine_name) FROM information_schema.routines WHERE routine_type = 'FUNCTION' "
        "AND FIND_IN_SET(lower(routine_name), %s)"
    ),
}
"""Selects, of some names, the functions that may write."""

_BODIES: Final = {
    "mysql": "SELECT routine_definition FROM information_schema.routines WHERE routine_type = 'PROCEDURE' "
    "AND lower(routine_name) = %s",
}
"""Selects the bodies of the procedures of a name, where a procedure may end the transaction that it is called in."""

_BETWEEN: Final = r"(?:\s|/\*.*?\*/|--\s[^\n]*\n|#[^\n]*\n)*"
_NAME: Final = r"(?:`[^`]+`|[\w$]+)"
_CALL: Final = re.compile(rf"\bCALL\b{_BETWEEN}(?:{_NAME}{_BETWEEN}\.{_BETWEEN})?({_NAME})", re.IGNORECASE | re.DOTALL)

_SENDS: Final = "pg_notify"
"""The one of PostgreSQL's own functions that has an effect which a rollback undoes."""


class Functions:
    """The functions of one database, by name: looked up once, when a query first calls them."""

    def __init__(self, vendor: str) -> None:
        self._question = _OWN.get(vendor)
        self._bodies = _BODIES.get(vendor)
        # -- mutable state ---------------------------------------------------------------------------------
        self._known: dict[str, bool] = {_SENDS: True}
        self._ending: dict[str, bool] = {}

    def may_write(self, query: str, ask: Callable[[str, list[str]], list[str]]) -> bool:
        """Return whether *query* calls a function that may write. Switches: yes, at a new name.

        Args:
            query: Its text.
            ask: Sends a query to the server, and returns the first column of the answer.
        """
        if self._question is None or "(" not in query:
            return False
        names = {name.lower() for name in _CALLED.findall(query)}
        if any(name not in self._known for name in names):
            found = ask(self._question, [",".join(names)])
            # no switch from here on
            if len(self._known) > _REMEMBERED:
                self._known = {}
            self._known |= {name: name in found or name == _SENDS for name in names}
        return any(self._known[name] for name in names)

    def may_end_transaction(
        self, statement: str, ask: Callable[[str, list[str]], list[str]], within: frozenset[str] = frozenset()
    ) -> bool:
        """Return whether *statement* calls a procedure that may end its transaction. Switches: yes, at a new name.

        A procedure whose body the role may not read counts as one that does not.

        Args:
            statement: Its text.
            ask: As in `may_write`.
            within: The procedures whose bodies contain it.
        """
        if self._bodies is None:
            return False
        return any(self._ends(name.strip("`").lower(), ask, within) for name in _CALL.findall(statement))

    def _ends(self, name: str, ask: Callable[[str, list[str]], list[str]], within: frozenset[str]) -> bool:
        if name in within:  # recursion: the rest of its body tells
            return False
        ends = self._ending.get(name)
        if ends is None:
            bodies = [body for body in ask(str(self._bodies), [name]) if body is not None]
            inside = within | {name}
            ends = any(ends_transaction(body) or self.may_end_transaction(body, ask, inside) for body in bodies)
            if ends or not within:  # else the recursive calls above were not looked into
                if len(self._ending) > _REMEMBERED:
                    self._ending = {}
                self._ending[name] = ends
        return ends
