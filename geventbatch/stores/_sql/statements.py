"""SQL texts: their first word, whether they read, and why an operation may not send one in its batch's transaction.

A text is checked word by word, without its literals and comments. The effects of functions on the server are not seen.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

REMEMBERED: Final = 2_000
"""Characters of the longest text of which something is cached: an ORM sends the same texts again and again."""

_LEADING: Final = re.compile(r"(?:[\s;(]+|--[^\n]*(?:\n|\Z)|#[^\n]*(?:\n|\Z)|/\*(?!M?!).*?\*/)+", re.DOTALL)
_WORD: Final = re.compile(r"[A-Za-z]+")

_PLAIN: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "WITH", "VALUES", "REPLACE", "MERGE"})
_SUSPECT: Final = (";", "lock", "set_config", "temp", "@", "/*!", "/*m!")
"""Lower case. Any forbidden text that begins with a plain word contains one of them."""

_QUOTED: Final = (
    r"\"(?:[^\"]|\"\")*\"|`[^`]*`|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*(?!M?!)(?:[^/*]|/(?!\*)|\*(?!/)|/\*.*?\*/)*\*/"
)
_ESCAPED: Final = r"'(?:[^'\\]|''|\\.)*'"
_NO_CODE: Final = re.compile(rf"\b[Ee]{_ESCAPED}|'(?:[^']|'')*'|{_QUOTED}", re.DOTALL)
_NO_CODE_MYSQL: Final = re.compile(
    rf"{_ESCAPED}|\"(?:[^\"\\]|\"\"|\\.)*\"|`[^`]*`|--\s[^\n]*|--$|#[^\n]*|/\*(?!M?!).*?\*/", re.DOTALL
)
_NAMING: Final = re.compile(r"\s*[(.]")
"""Follows the name of a function, or of a schema."""

_EXECUTED: Final = re.compile(r"/\*M?!\d*|\*/")
"""Encloses text that MySQL executes: no comment for it."""

_TRANSACTION: Final = re.compile(
    r"(?:BEGIN|START TRANSACTION|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|PREPARE TRANSACTION|XA)\b"
)
_SESSION: Final = re.compile(
    r"(?:SET|RESET|DISCARD|LISTEN|UNLISTEN|PREPARE|DEALLOCATE|USE|ATTACH|DETACH|UNLOCK|HANDLER"
    r"|EXECUTE IMMEDIATE|LOCK INSTANCE|LOCK TABLES?\b.* (?:READ|WRITE)|DECLARE\b.* WITH HOLD"
    r"|(?:CREATE|DROP)(?: OR REPLACE)?(?: LOCAL| GLOBAL)? TEMP(?:ORARY)?)\b|CREATE\b.* PG_TEMP ?\."
)
_FUNCTION: Final = re.compile(
    r"\b(?:SET_CONFIG|PG_(?:TRY_)?ADVISORY_LOCK(?:_SHARED)?|PG_ADVISORY_UNLOCK(?:_SHARED|_ALL)?"
    r"|GET_LOCK|RELEASE_LOCK|RELEASE_ALL_LOCKS) ?\("
)
_INTO_TEMPORARY: Final = re.compile(
    r"(?<!INSERT )(?<!REPLACE )(?<!MERGE )(?<!IGNORE )\bINTO (?:LOCAL |GLOBAL )?TEMP(?:ORARY)? \w"
)
_VARIABLE: Final = re.compile(r"(?<![\w@])@\w+ ?:=|\bINTO @\w")
_SETTING: Final = re.compile(
    r"PRAGMA (?:\w+ ?\. ?)?"
    r"(?!(?:TABLE|INDEX)_X?(?:INFO|LIST)\b|FOREIGN_KEY_(?:LIST|CHECK)\b|(?:INTEGRITY|QUICK)_CHECK\b)\w+ ?[=(]"
)
_STATEMENT_ONLY: Final = re.compile(r"SET STATEMENT .*? FOR (?=[A-Z])")
_BODY: Final = re.compile(r"CREATE\b.* (?:TRIGGER|FUNCTION|PROCEDURE|EVENT|PACKAGE) ")
_COMMITTING: Final = re.compile(
    r"(?:ALTER|CREATE|DROP|RENAME|TRUNCATE|ANALYZE|CACHE|CHECK|FLUSH|LOAD INDEX|OPTIMIZE|REPAIR|GRANT|REVOKE|INSTALL"
    r"|UNINSTALL|BACKUP|IMPORT|(?:START|STOP) (?:ALL )?(?:SLAVE|REPLICA|GROUP_REPLICATION)"
    r"|CHANGE (?:MASTER|REPLICATION))\b"
)

_ENDING: Final = re.compile(
    r"\b(?:COMMIT|ROLLBACK(?! (?:WORK )?TO\b)|START TRANSACTION|BEGIN WORK|(?:CREATE|DROP)(?! TEMPORARY)|ALTER"
    r"|RENAME TABLE|TRUNCATE(?! ?\()|(?:UN)?LOCK TABLES?|GRANT|REVOKE|EXECUTE|(?:ANALYZE|OPTIMIZE|REPAIR) TABLES?"
    r"|FLUSH|AUTOCOMMIT|XA)\b"
)
"""In the body of a procedure. (The effect of EXECUTE is unknown.)"""

_READS: Final = frozenset({"SELECT", "VALUES", "TABLE", "SHOW", "SET"})
_MAY_READ: Final = frozenset({"WITH", "EXPLAIN"})
_WRITING: Final = re.compile(
    r"\b(?:INSERT|DELETE|MERGE|REPLACE) (?:INTO|FROM|LOW_|DELAYED|IGNORE|QUICK)|(?<!FOR )(?<!KEY )\bUPDATE\b"
)

_OF_TRANSACTION: Final = (
    "{} would begin or end the transaction that all operations of the batch share: the batch does that, and a "
    "savepoint is the ORM's (begin_nested(), atomic())"
)
_OF_SESSION: Final = (
    "{} would reach the operations of other callers and the save, which are in the same session: set it for all "
    "connections, or do it outside of the batch"
)
_OF_COMMIT: Final = "{} makes MySQL commit what the batch has not saved yet: send it outside of the batch"


def first_word(statement: str) -> str:
    """Return the first word in upper case, after blanks, brackets and comments; empty if there is none."""
    found = _WORD.match(statement) or _WORD.match(statement, start(statement))
    return found.group().upper() if found else ""


def start(statement: str) -> int:
    """Return the index of the first word."""
    found = _LEADING.match(statement)
    return found.end() if found else 0


def forbidden(statement: str, *, mysql: bool = False) -> str | None:
    """Return why an operation may not send *statement* in its batch's transaction; None if it may. Switches: no.

    It may not begin or end the transaction, nor set anything in the session, which other operations share.

    Args:
        mysql: Whether the server is MySQL or MariaDB, which parses literals differently, and commits by itself before a
            statement that changes a table's definition.
    """
    return (_remembered if len(statement) <= REMEMBERED else _forbidden)(statement, mysql)


def ends_transaction(body: str) -> bool:
    """Return whether the *body* of a MySQL procedure contains what ends a transaction. Switches: no."""
    code = _NO_CODE_MYSQL.sub(_left, body)
    return _ENDING.search(" ".join(_EXECUTED.sub(" ", code).upper().split())) is not None


def reads(statement: str) -> bool:
    """Return whether *statement* only reads; the effects of functions in it are not seen. Switches: no."""
    if statement.startswith("SELECT"):
        return True
    word = first_word(statement)
    if word not in _MAY_READ:
        return word in _READS
    return _WRITING.search(code_of(statement)) is None


def code_of(statement: str, *, mysql: bool = False) -> str:
    """Return *statement* without literals and comments, in upper case with single blanks. Switches: no."""
    return " ".join((_NO_CODE_MYSQL if mysql else _NO_CODE).sub(_left, statement).upper().split())


def _forbidden(statement: str, mysql: bool) -> str | None:  # noqa: FBT001 - `lru_cache` is quicker so
    if first_word(statement) in _PLAIN:
        lowered = statement.lower()
        if not any(suspect in lowered for suspect in _SUSPECT):
            return None
    code = (_NO_CODE_MYSQL if mysql else _NO_CODE).sub(_left, statement)
    code = " ".join(_EXECUTED.sub(" ", code).upper().split())
    if _BODY.match(code):  # the statements of a body run later
        return _judged(code.partition(";")[0], mysql=mysql)
    parts = (part.lstrip(" (") for part in code.split(";"))
    return next((why for part in parts if part and (why := _judged(part, mysql=mysql)) is not None), None)


def _left(found: re.Match[str]) -> str:
    """Return the replacement of a literal, comment or quoted name: a name stays if it is called, or a variable's."""
    first = found[0][0]
    if first in "-#/":
        return " "
    if found.string[: found.start()].endswith("@"):
        return "named"
    if first in '`"' and _NAMING.match(found.string, found.end()):
        return f" {found[0][1:-1]}"
    return " '' "


_remembered = lru_cache(maxsize=512)(_forbidden)


def _judged(code: str, *, mysql: bool) -> str | None:
    """Return why one statement is forbidden, which has no literals, and is in upper case with single blanks."""
    code = _STATEMENT_ONLY.sub("", code, count=1) if code.startswith("SET STATEMENT ") else code
    if _TRANSACTION.match(code):
        return _OF_TRANSACTION.format(_named(code))
    if _SESSION.match(code) or _SETTING.match(code):
        return _OF_SESSION.format(_named(code))
    found = _FUNCTION.search(code) or _INTO_TEMPORARY.search(code) or _VARIABLE.search(code)
    if found is not None:
        return _OF_SESSION.format(found[0].strip(" (:=").lower())
    return _OF_COMMIT.format(_named(code)) if mysql and _COMMITTING.match(code) else None


def _named(code: str) -> str:
    """Return the first word of a statement, or two."""
    words = code.split(" ")
    return " ".join(words[:2] if words[0] in {"START", "PREPARE", "CREATE", "DROP", "LOCK"} else words[:1])
