"""Names of a resource's outcomes in Redis: in the same slot of a cluster, and different from any other resource's."""

from __future__ import annotations

import re
from typing import Final

_TAG: Final = re.compile(rb"^[^{]*\{[^}]+\}")
"""Matches a hash tag: a cluster finds the slot of a key by the text between these braces."""

_WORD: Final = b"idempotency"
_MARK: Final = b":idempotency:"


def has_tag(resource: bytes) -> bool:
    """Return whether a cluster finds the slot of *resource* by a hash tag in it."""
    return _TAG.search(resource) is not None


def outcome_name(resource: bytes, idempotency_key: bytes) -> bytes:
    """Return the name of the outcome of the operation on *resource* with *idempotency_key*.

    No two pairs have the same name. A resource without braces is put into some, so the first closing brace is its end.
    A name with a tag is kept as it is, if its end is certain. All other names have a space in front of the word, which
    an idempotency key never has, so the last space is their end.
    """
    if b"{" not in resource and b"}" not in resource:
        return b"{%b}%b%b" % (resource, _MARK, idempotency_key)
    if not has_tag(resource):
        return b"{%b} %b-of:%b" % (resource, _WORD, idempotency_key)
    if _is_clear(resource, idempotency_key):
        return b"%b%b%b" % (resource, _MARK, idempotency_key)
    return b"%b %b:%b" % (resource, _WORD, idempotency_key)


def _is_clear(resource: bytes, idempotency_key: bytes) -> bool:
    """Return whether *resource* surely ends at the mark, and is no other resource in braces."""
    in_braces = resource.startswith(b"{") and resource.endswith(b"}")
    return not in_braces and _WORD not in resource and _MARK not in b":" + idempotency_key
