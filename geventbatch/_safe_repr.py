"""What users made, in a message: a `repr` of theirs may raise, and gives whatever it likes."""

from __future__ import annotations

from typing import Final

import gevent

_OURS: Final = (gevent.GreenletExit, SystemExit, KeyboardInterrupt, gevent.Timeout)
"""What is thrown at a greenlet that waits, in a `repr` too, and is for the greenlet."""


def shown(value: object) -> str:
    """Give the `repr` of *value*, or what it would be but for its class. Switches: as that does."""
    try:
        return str.__str__(repr(value))  # and no subclass, whose formatting would be the user's again
    except BaseException as error:
        if isinstance(error, _OURS):
            raise
        return object.__repr__(value)


def said(error: BaseException) -> str:
    """Give what *error* says, or what it is where it cannot say that. Switches: as that does."""
    try:
        return str.__str__(str(error))
    except BaseException as raised:
        if isinstance(raised, _OURS):
            raise
        return object.__repr__(error)


def named(value: object) -> str:
    """Give that, but of a URL with a password no more than what it is of."""
    if isinstance(value, str) and "://" in value and "@" in value:
        return f"a URL ('{value.partition('://')[0]}://…')"
    return shown(value)
