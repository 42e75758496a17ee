"""Objects of users in a message: their `repr` may raise, or return something odd."""

from __future__ import annotations

from typing import Final

import gevent

_OURS: Final = (gevent.GreenletExit, SystemExit, KeyboardInterrupt, gevent.Timeout)
"""Errors that are thrown into a waiting greenlet, perhaps in a `repr`, and are for the greenlet."""


def shown(value: object) -> str:
    """Return the `repr` of *value*, or the one of `object` if it raises. Switches: if that `repr` does."""
    try:
        return str.__str__(repr(value))  # a plain str: the formatting of a subclass would be the user's code again
    except BaseException as error:
        if isinstance(error, _OURS):
            raise
        return object.__repr__(value)


def said(error: BaseException) -> str:
    """Return the text of *error*, or the `repr` of `object` if it raises. Switches: if the error's ``__str__`` does."""
    try:
        return str.__str__(str(error))
    except BaseException as raised:
        if isinstance(raised, _OURS):
            raise
        return object.__repr__(error)


def named(value: object) -> str:
    """Return `shown` of *value*; for a URL that may have a password, only its scheme."""
    if isinstance(value, str) and "://" in value and "@" in value:
        return f"a URL ('{value.partition('://')[0]}://…')"
    return shown(value)
