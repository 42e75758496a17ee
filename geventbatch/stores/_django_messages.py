"""Several statements in one message to PostgreSQL: what psycopg 3 sends of a batch's transaction together."""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

from django.db import DatabaseError, Error, NotSupportedError

from geventbatch.errors import Conflict
from geventbatch.stores import _sql
from geventbatch.stores._driver_errors import message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from geventbatch.stores._django_transaction import Transaction

    Execute = Callable[..., Any]
    Statement = tuple[str, Sequence[object] | None]

_refused: Final[set[tuple[str, str]]] = set()
"""The databases and statements that PostgreSQL does not take with RETURNING, or in WITH: of tables that have rules."""

_WRITES: Final = frozenset({"INSERT", "UPDATE"})
_OTHER_ROWS: Final = f"rows were written {token_hex(8)}"
"""In the error of a statement that has written another number of rows than it should."""


class Together:
    """Sends the next statement of Django's in one message with those before and after it; or one after the other."""

    def __init__(self, owner: Transaction, before: Sequence[Statement], *, commits: int = 0) -> None:
        """Send COMMIT behind it where it *commits* so many rows."""
        self.answers: list[tuple[Any, ...]] = []
        self._owner = owner
        self._before = before
        self._commits = commits
        self._sent = False

    def __call__(self, execute: Execute, sql: Any, params: Any, many: bool, context: Any) -> Any:
        if self._sent or many or (self._commits and not begins(sql, _WRITES)):
            return execute(sql, params, many, context)
        self._sent = True
        if not self._owner.pipelines:
            self._send_before()
            return execute(sql, params, many, context)
        cursor = context["cursor"].cursor
        statement = self._owner.connection.alias, sql
        commits = bool(self._commits) and statement not in _refused
        ours = [(_checked(sql, self._commits), params), ("COMMIT", None)] if commits else [(sql, params)]
        statements = [*self._before, *ours]
        with self._owner.connection.wrap_database_errors:
            text = _joined(cursor, statements)  # which may raise for a value that cannot be encoded
        self._owner.may_be_committed = commits
        try:
            executed = execute(text, None, many, context)
        except Error as error:
            if commits and isinstance(error, NotSupportedError):
                _refused.add(statement)
                raise Conflict("the table has rules, so that COMMIT is sent by itself: all is applied again") from error
            if _OTHER_ROWS not in message(error):
                raise
            raise DatabaseError(
                "the database has written none of it, or not all: a trigger has left it out, or a policy has hidden it"
            ) from error
        self._owner.committed = commits
        self._take_answers(cursor)
        return executed

    def send(self) -> None:
        """Send those before it, if nothing was sent yet. Switches: yes."""
        if not self._sent:
            self._sent = True
            self._send_before()

    def _send_before(self) -> None:
        raw: Any = self._owner.connection.connection
        cursor = raw.cursor()
        with self._owner.connection.wrap_database_errors:
            for statement, params in self._before:
                cursor.execute(statement, params)
                if cursor.description is not None:
                    self.answers.append(cursor.fetchone())

    def _take_answers(self, cursor: Any) -> None:
        """Leave *cursor* at the answer to Django's own statement."""
        for _ in self._before:
            if cursor.description is not None:
                self.answers.append(cursor.fetchone())
            cursor.nextset()


def _checked(sql: str, rows: int) -> str:
    """One that gives the same and fails, by a text that is no number, unless it writes so many *rows*."""
    returns = " RETURNING " in sql
    counted = f"CASE count(*) WHEN {rows} THEN 1 ELSE CAST(count(*) || ' {_OTHER_ROWS}' AS integer) END"
    written = f"WITH written AS ({sql}{'' if returns else chr(10) + 'RETURNING 1'}\n)"  # a comment may be its end
    if not returns:
        return f"{written} SELECT {counted} FROM written"  # noqa: S608 - a statement that Django has made
    checked = f"(SELECT {counted} AS checked FROM written) AS counted"  # noqa: S608 - as above
    found = f"SELECT written.* FROM {checked} LEFT JOIN written ON true WHERE counted.checked = 1"  # noqa: S608
    return f"{written} {found}"


def _joined(cursor: Any, statements: Sequence[Statement]) -> str:
    """One text, of which the driver knows how to send it."""
    texts = (str(sql) if params is None else cursor.mogrify(sql, params) for sql, params in statements)
    text = _sql.SEPARATOR.join(texts)
    text.encode(cursor.connection.info.encoding)  # a half of a surrogate pair is found out before anything is sent
    return text


def begins(sql: object, words: frozenset[str]) -> bool:
    """Whether *sql* is a text that begins with one of *words*. Switches: no."""
    return isinstance(sql, str) and _sql.first_word(sql) in words
