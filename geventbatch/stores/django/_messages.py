"""Several statements in one message to PostgreSQL, as psycopg 3 sends them for a batch's transaction."""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from django.db import DatabaseError, Error, NotSupportedError

from geventbatch.errors import Conflict
from geventbatch.stores._sql import bounds
from geventbatch.stores._sql import statements as sql_statements
from geventbatch.stores._sql.driver_errors import message
from geventbatch.stores.django import _lossy_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from geventbatch.stores.django._transaction import Transaction

    Execute = Callable[..., Any]
    Statement = tuple[str, Sequence[object] | None]

_refused: Final[set[tuple[str, str]]] = set()
"""Databases and their statements that PostgreSQL takes neither with RETURNING nor in WITH: their tables have rules."""

_MANY: Final = 1
"""Values of a statement from which on it is quicker to put them in without psycopg's search."""

_SELECT: Final = frozenset({"SELECT"})
_OTHER_ROWS: Final = f"rows were written {token_hex(8)}"
"""Marks the error of a statement that has written fewer or more rows than it should."""


class Written(NamedTuple):
    """A statement that COMMIT may be sent with: one INSERT or UPDATE."""

    table: str
    rows: int
    """The number of rows that it must write."""


class Together:
    """Sends Django's next statement in one message with *before* and COMMIT; if it cannot, one after the other."""

    def __init__(self, owner: Transaction, before: Sequence[Statement], *, commits: Written | None = None) -> None:
        """Send COMMIT behind the statement if it is the one that *commits* describes."""
        self.answers: list[tuple[Any, ...]] = []
        self._owner = owner
        self._before = before
        self._commits = commits
        self._sent = False

    def __call__(self, execute: Execute, sql: Any, params: Any, many: bool, context: Any) -> Any:
        written = self._commits
        if self._sent or many or (written is not None and begins(sql, _SELECT)):
            self._owner.only = False  # a field's `pre_save` may send more
            return execute(sql, params, many, context)
        self._sent = True
        if not self._owner.pipelines:
            self._send_before()
            return execute(sql, params, many, context)
        statement = sql, params
        if written is not None and isinstance(sql, str) and (self._owner.connection.alias, sql) not in _refused:
            table = self._owner.connection.ops.quote_name(written.table)
            if sql.startswith((f"UPDATE {table} ", f"INSERT INTO {table} "), sql_statements.start(sql)):
                return self._commit(execute, statement, context, table, written.rows)
        return self._execute(execute, [*self._before, statement], context)

    def _commit(self, execute: Execute, statement: Statement, context: Any, table: str, rows: int) -> Any:
        """Send it with COMMIT, and count its *rows* first, unless it writes one row and *table* takes every row."""
        owner, alias = self._owner, self._owner.connection.alias
        takes_all = owner.only and _lossy_tables.takes_all(alias, table)
        look = takes_all is None
        if look:
            self._before = [*self._before, (_lossy_tables.LOOK, (table,))]
        sql, params = statement
        ours = sql if takes_all else _checked(sql, rows)
        try:
            executed = self._execute(execute, [*self._before, (ours, params), ("COMMIT", None)], context, commits=True)
        except NotSupportedError as error:
            _refused.add((alias, sql))
            raise Conflict("the table has rules, so that COMMIT is sent by itself: all is applied again") from error
        except Error as error:
            if _OTHER_ROWS not in message(error):
                raise
            raise DatabaseError(
                "the database has written none of it, or not all: a trigger has left it out, or a policy has hidden it"
            ) from error
        if look:
            _lossy_tables.note(alias, table, answer=self.answers[-1][0])
        if takes_all and not context["cursor"].cursor.rowcount:  # nothing was written
            _lossy_tables.distrust(alias, table)
            owner.may_be_committed = False
            raise Conflict("the database has left it out, as a trigger may that is new: all is applied again")
        owner.committed = True
        return executed

    def send(self) -> None:
        """Send *before*, if nothing was sent yet. Switches: yes."""
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

    def _execute(
        self, execute: Execute, statements: Sequence[Statement], context: Any, *, commits: bool = False
    ) -> Any:
        cursor = context["cursor"].cursor
        with self._owner.connection.wrap_database_errors:
            text = joined(cursor, statements)  # raises if a value cannot be encoded
        self._owner.may_be_committed = commits
        executed = execute(text, None, False, context)  # noqa: FBT003 - Django's own signature
        self._take_answers(cursor)
        return executed

    def _take_answers(self, cursor: Any) -> None:
        """Move *cursor* to the answer to Django's own statement."""
        for _ in self._before:
            if cursor.pgresult.nfields:  # its `description` makes an object of each column
                self.answers.append(cursor.fetchone())
            cursor.nextset()


def _checked(sql: str, rows: int) -> str:
    """Return a statement with the same answer, which fails (at a cast) unless it writes so many *rows*."""
    returns = " RETURNING " in sql
    counted = f"CASE count(*) WHEN {rows} THEN 1 ELSE CAST(count(*) || ' {_OTHER_ROWS}' AS integer) END"
    written = f"WITH written AS ({sql}{'' if returns else chr(10) + 'RETURNING 1'}\n)"  # it may end in a comment
    if not returns:
        return f"{written} SELECT {counted} FROM written"  # noqa: S608 - a statement that Django has made
    checked = f"(SELECT {counted} AS checked FROM written) AS counted"  # noqa: S608 - as above
    found = f"SELECT written.* FROM {checked} LEFT JOIN written ON true WHERE counted.checked = 1"  # noqa: S608
    return f"{written} {found}"


def joined(cursor: Any, statements: Sequence[Statement]) -> str:
    """Return the statements, with their values, as one text."""
    texts = [str(sql) if params is None else _with_values(cursor, sql, params) for sql, params in statements]
    text = bounds.SEPARATOR.join(texts)
    text.encode(cursor.connection.info.encoding)  # fails at half a surrogate pair, before anything is sent
    return text


def _with_values(cursor: Any, sql: str, params: Any) -> str:
    """Return what *cursor* makes of a statement and its values; mostly without its search for each placeholder.

    That took psycopg two thirds of the time for a bulk's statements, whose placeholders it does not cache.
    """
    count = len(params)
    plain = isinstance(sql, str) and isinstance(params, list | tuple)
    if count < _MANY or not plain or not sql.count("%") == sql.count("%s") == count:
        return str(cursor.mogrify(sql, params))
    from psycopg.adapt import Transformer

    literals = Transformer(cursor)
    values = tuple([b"NULL" if value is None else literals.as_literal(value) for value in params])
    return (sql.encode(literals.encoding) % values).decode(literals.encoding)


def begins(sql: object, words: frozenset[str]) -> bool:
    """Return whether *sql* is a text that begins with one of *words*. Switches: no."""
    return isinstance(sql, str) and sql_statements.first_word(sql) in words
