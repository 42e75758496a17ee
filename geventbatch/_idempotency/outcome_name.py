"""The name of an outcome in a bulk: of the keys of its operation, and of its idempotency key.

It is the same in every process: keys are put in the order of their texts, and equal keys have one text.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from geventbatch._idempotency.value_text import encode
from geventbatch.scopes import OutcomeName

if TYPE_CHECKING:
    from collections.abc import Hashable


def name_of(keys: tuple[Hashable, ...], idempotency_key: str, *, across: bool) -> OutcomeName:
    """Return the name of the outcome of an operation at *keys*. Raise any error, if one of them has no text."""
    texts = {text_of(key): key for key in keys}
    told = "\n".join(sorted(texts))
    digest = blake2b(f"across\n{told}".encode() if across else told.encode(), digest_size=16).hexdigest()
    name = OutcomeName(f"{digest}:{idempotency_key}")
    name.keys = tuple([texts[text] for text in sorted(texts)])
    name.idempotency_key = idempotency_key
    name.across = across
    return name


def text_of(key: Hashable) -> str:
    """Return a line of ASCII that is the same for keys that are equal. Raise any error, if *key* has none."""
    return encode(_canonical(key))


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
