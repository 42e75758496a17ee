"""The name of an outcome in a bulk: of the keys of its operation, and of its idempotency key.

It is the same in every process: keys are put in the order of their texts, and equal keys have one text.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from hashlib import blake2b
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from geventbatch._idempotency.value_text import encode
from geventbatch.scopes import OutcomeName

if TYPE_CHECKING:
    from collections.abc import Hashable


def name_of(keys: tuple[Hashable, ...], idempotency_key: str, *, across: bool) -> OutcomeName:
    """Return the name of the outcome of an operation at *keys*. Raise any error, if one of them has no text."""
    return name_by([text_of(key) for key in keys], keys, idempotency_key, across=across)


def name_by(texts: list[str], keys: tuple[Hashable, ...], idempotency_key: str, *, across: bool) -> OutcomeName:
    """Do the same by the *texts* of *keys*."""
    told = texts[0]
    if across:
        pairs = sorted(zip(texts, keys, strict=True), key=itemgetter(0))
        keys = tuple([key for _, key in pairs])
        told = "\n".join(["across", *[text for text, _ in pairs]])
    name = OutcomeName(f"{blake2b(told.encode(), digest_size=16).hexdigest()}:{idempotency_key}")
    name.keys, name.idempotency_key, name.across = keys, idempotency_key, across
    return name


def text_of(key: Hashable) -> str:
    """Return a line of ASCII that is the same for keys that are equal. Raise any error, if *key* has none."""
    return encode(key if type(key) is str or type(key) is int else _canonical(key))


def _canonical(key: Any) -> Any:
    """Return a plain value that is the same for keys that are equal."""
    kind = type(key)
    if kind is str or kind is int:
        return key
    if isinstance(key, tuple):
        return tuple(map(_canonical, key))
    if isinstance(key, (int, float, Decimal)):  # True == 1 == 1.0 == Decimal("1.00")
        numerator, denominator = key.as_integer_ratio()
        return numerator if denominator == 1 else ("ratio", numerator, denominator)
    if isinstance(key, datetime) and key.utcoffset() is not None:
        return key.astimezone(UTC)
    return str.__str__(key) if isinstance(key, str) else key
