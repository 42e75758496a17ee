"""Names of a resource's outcomes in Redis: in the same slot of a cluster, and different from any other resource's."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Final

_TAG: Final = re.compile(rb"^[^{]*\{[^}]+\}")
"""Matches a hash tag: a cluster finds the slot of a key by the text between these braces."""

_WORD: Final = b"idempotency"
_ACROSS: Final = b"idempotency-across"
_MARK: Final = b":idempotency:"


def has_tag(resource: bytes) -> bool:
    """Return whether a cluster finds the slot of *resource* by a hash tag in it."""
    return _TAG.search(resource) is not None


def outcome_name_across(resources: list[bytes], idempotency_key: bytes) -> bytes:
    """Return the name of the outcome of the operation across *resources* with *idempotency_key*.

    It is the name that the first of them would have, but for the word, and with a digest of all of them. So it lies in
    their slot of a cluster.
    """
    digest = blake2b(b"".join([b"%d:%b" % (len(one), one) for one in resources]), digest_size=16).hexdigest()
    return outcome_name(resources[0], b"%b:%b" % (digest.encode(), idempotency_key), word=_ACROSS)


def outcome_name(resource: bytes, idempotency_key: bytes, *, word: bytes = _WORD) -> bytes:
    """Return the name of the outcome of the operation on *resource* with *idempotency_key*.

    No two pairs have the same name. A resource without braces is put into some, so the first closing brace is its end.
    A name with a tag is kept as it is, if its end is certain. All other names have a space in front of the word, which
    an idempotency key never has, so the last space is their end.
    """
    if b"{" not in resource and b"}" not in resource:
        return b"{%b}:%b:%b" % (resource, word, idempotency_key)
    if not has_tag(resource):
        return b"{%b} %b-of:%b" % (resource, word, idempotency_key)
    if _is_clear(resource, idempotency_key):
        return b"%b:%b:%b" % (resource, word, idempotency_key)
    return b"%b %b:%b" % (resource, word, idempotency_key)


def _is_clear(resource: bytes, idempotency_key: bytes) -> bool:
    """Return whether *resource* surely ends at the mark, and is no other resource in braces."""
    in_braces = resource.startswith(b"{") and resource.endswith(b"}")
    return not in_braces and _WORD not in resource and _MARK not in b":" + idempotency_key
