"""What the outcomes of a resource are called in Redis: beside it in a cluster, and never as those of another one."""

from __future__ import annotations

import re
from typing import Final

_TAG: Final = re.compile(rb"^[^{]*\{[^}]+\}")
"""By what is between these braces, where they are, a cluster knows the slot of a key."""

_WORD: Final = b"idempotency"
_MARK: Final = b":idempotency:"


def has_tag(resource: bytes) -> bool:
    """Whether a cluster knows the slot of *resource* by a part of it."""
    return _TAG.search(resource) is not None


def outcome_name(resource: bytes, idempotency_key: bytes) -> bytes:
    """The name of the outcome of the operation on *resource* that had the *idempotency_key*.

    Of no two pairs is it the same. A resource without braces is put into some: the first one that closes is its end. A
    name with a tag stands there as it is, where there can be no doubt where it ends. All others have a space in front
    of the word, which an idempotency key never has: so the last space is their end.
    """
    if b"{" not in resource and b"}" not in resource:
        return b"{%b}%b%b" % (resource, _MARK, idempotency_key)
    if not has_tag(resource):
        return b"{%b} %b-of:%b" % (resource, _WORD, idempotency_key)
    if _is_clear(resource, idempotency_key):
        return b"%b%b%b" % (resource, _MARK, idempotency_key)
    return b"%b %b:%b" % (resource, _WORD, idempotency_key)


def _is_clear(resource: bytes, idempotency_key: bytes) -> bool:
    """Whether *resource* ends at the only mark, and is not what another one is with braces around it."""
    in_braces = resource.startswith(b"{") and resource.endswith(b"}")
    return not in_braces and _WORD not in resource and _MARK not in b":" + idempotency_key
