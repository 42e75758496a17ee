"""The user's statements: checked when a store is made, with the names of their parameters."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from geventbatch._safe_repr import named, shown
from geventbatch.stores._sql.statements import code_of, first_word

if TYPE_CHECKING:
    from collections.abc import Sequence

_PARAMETER: Final = re.compile(r"%(?:(%)|\((\w+)\)s|(s)|)")

_LOCKS: Final = re.compile(r"\bFOR (?:NO KEY )?UPDATE\b")
_OVERWRITES: Final = re.compile(r"\bDO UPDATE\b|\bON DUPLICATE KEY\b")
_TABLE: Final = re.compile(
    r"\s*UPDATE\s+(?:ONLY\s+)?((?:[\w$]+|\"[^\"]+\"|`[^`]+`)(?:\.(?:[\w$]+|\"[^\"]+\"|`[^`]+`))?)", re.IGNORECASE
)

_COLUMN_OF_KEY: Final = re.compile(r"((?:[\w$]+|\"[^\"]+\"|`[^`]+`))\s*=\s*%\(key\)s", re.IGNORECASE)

_BRACKETS: Final = re.compile(r"\([^()]*\)")
_WRITES_WITHIN: Final = re.compile(r"\( ?(?:UPDATE|DELETE|MERGE)\b")
_INSERTS_WITH: Final = re.compile(r"WITH (?:(?!INSERT\b|UPDATE\b|DELETE\b|MERGE\b|SELECT\b).)* INSERT INTO\b")

_WORDS: Final = {
    "load": ("SELECT", "WITH"),
    "load_many": ("SELECT", "WITH"),
    "save": ("UPDATE",),
    "insert": ("INSERT",),
    "delete": ("DELETE", "UPDATE"),
}
"""The words that a statement may begin with, by its option."""

SEVERAL: Final = "which are several statements, but must be one"


class Statement(NamedTuple):
    """One of the user's statements."""

    option: str
    text: str
    names: frozenset[str]
    """Of its parameters."""


def statement(option: str, text: Any, keys: Sequence[str], *, allowed: Sequence[str] | None = None) -> Statement:
    """Check *text*, and return the statement. Raises a `TypeError` or a `ValueError` that says what to write.

    Args:
        option: The option that it was passed as.
        text: The statement, with parameters as ``%(name)s``. If it has no others than *allowed*, ``%s`` will do.
        keys: The names of the key's values.
        allowed: The parameters that it may have; None: those of a resource too.
    """
    if not isinstance(text, str):
        raise TypeError(f"{option} is {named(text)}, but must be a statement, as a str")
    body = text.strip().rstrip(";").rstrip()
    body, names = _parameters(option, body, allowed)
    code = code_of(body)
    if first_word(body) not in _WORDS[option]:
        raise ValueError(
            f"{option} is {shown(text)}, but must be a statement that begins with {_either(_WORDS[option])}"
        )
    if ";" in code:
        raise ValueError(f"{option} is {shown(text)}, {SEVERAL}")
    _check_names(option, text, names, keys, allowed)
    _check_code(option, text, code)
    return Statement(option, body, names)


@lru_cache(maxsize=1000)
def inserts(text: str) -> bool:
    """Return whether *text* is an INSERT, of rows that it may compute by WITH."""
    word = first_word(text)
    if word != "WITH":
        return word == "INSERT"
    code = code_of(text)
    if _WRITES_WITHIN.search(code):
        return False
    while (inner := _BRACKETS.sub(" ", code)) != code:
        code = inner
    return _INSERTS_WITH.match(code) is not None


@lru_cache(maxsize=1000)
def is_several(text: str, *, mysql: bool) -> bool:
    """Return whether *text* is several statements: drivers send them all. A semicolon at its end begins no other."""
    return ";" in text and ";" in code_of(text, mysql=mysql).strip("; ")


def table_of(save: Statement) -> str:
    """Return the table that *save* updates."""
    found = _TABLE.match(save.text)
    return found[1] if found else save.text


def column_of_key(save: Statement) -> str:
    """Return the column that *save* compares with ``%(key)s``, for messages; "key" if that cannot be told."""
    found = _COLUMN_OF_KEY.search(save.text)
    return found[1] if found else "key"


def _parameters(option: str, text: str, allowed: Sequence[str] | None) -> tuple[str, frozenset[str]]:
    """Return *text* with all parameters by name, and the names."""
    names: list[str] = []
    places = 0

    def name(found: re.Match[str]) -> str:
        nonlocal places
        percent, by_name, place = found.groups()
        if percent:
            return "%%"
        if by_name:
            names.append(by_name)
            return found[0]
        if not place:
            raise ValueError(f"{option} is {shown(text)}: write %% for a percent sign, and %(name)s for a parameter")
        if allowed is None:
            raise ValueError(
                f"{option} is {shown(text)}: a parameter %s does not say which value it is; write %(name)s, with the "
                "name of the column or attribute"
            )
        if places >= len(allowed):
            raise ValueError(
                f"{option} is {shown(text)}: it has more parameters than there are values: {_told(allowed)}"
            )
        names.append(allowed[places])
        places += 1
        return f"%({names[-1]})s"

    return _PARAMETER.sub(name, text), frozenset(names)


def _check_names(
    option: str, text: str, names: frozenset[str], keys: Sequence[str], allowed: Sequence[str] | None
) -> None:
    unknown = names.difference(allowed) if allowed is not None else ()
    if unknown:
        raise ValueError(
            f"{option} is {shown(text)}: nothing is known for {_told(sorted(unknown))}; its parameters are "
            f"{_told(allowed or ())} (see the option key)"
        )
    missing = [name for name in allowed or keys if name not in names]
    if missing and option != "insert":
        raise ValueError(
            f"{option} is {shown(text)}: it does not use {_told(missing)}, so it would not be of the row of the key"
        )


def _check_code(option: str, text: str, code: str) -> None:
    if option in {"load", "load_many"}:
        if not _LOCKS.search(code):
            raise ValueError(
                f"{option} is {shown(text)}: it does not lock the row, so what others write meanwhile would be lost; "
                "write … FOR UPDATE"
            )
        if option == "load_many" and "ORDER BY" not in code:
            raise ValueError(
                f"{option} is {shown(text)}: two transactions that lock the same rows in another order deadlock; write "
                "ORDER BY, with the column of the key, before FOR UPDATE"
            )
        if "SKIP LOCKED" in code:
            raise ValueError(f"{option} is {shown(text)}: with SKIP LOCKED, a row that is locked counts as missing")
    elif re.search(r"\bRETURNING\b", code):
        raise ValueError(f"{option} is {shown(text)}: nobody would read what it returns; write it without RETURNING")
    if option == "insert" and _OVERWRITES.search(code):
        raise ValueError(
            f"{option} is {shown(text)}: it would overwrite a row that somebody else has inserted meanwhile; write a "
            "plain INSERT: then the batch is replayed"
        )


def _told(names: Sequence[str]) -> str:
    return ", ".join(f"%({name})s" for name in names)


def _either(words: Sequence[str]) -> str:
    return " or ".join(words)
