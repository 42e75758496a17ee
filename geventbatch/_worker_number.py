"""The default number of a key's shard, the same in every process and on every machine."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import TYPE_CHECKING, Final
from uuid import UUID
from zlib import crc32

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Hashable

_MOST_DIGITS: Final = 4300
"""The most digits of a whole number: Python makes no longer text of one, since the time grows with their square."""

_SHORTENED: Final = Context(prec=28, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
"""The default context of a thread, except that it takes all exponents."""


def worker_number_for_key(key: Hashable, workers: int) -> int:
    """Return the number of the shard of *key*, the same in every process and on every machine.

    Equal keys get equal numbers. The builtin ``hash`` is not used, since it differs between processes.

    Args:
        key: A `str`, `bytes`, `int`, `UUID`, `Decimal`, `date`, `datetime`, or a tuple of them.
        workers: How many shards there are.

    Returns:
        A number from 0 to ``workers - 1``.

    Raises:
        TypeError: *key* is of another type.
        ValueError: It is a whole number of more than 4,300 digits.
    Switches: no.
    """
    if type(key) is str and key.isascii():
        return crc32(b"s" + key.encode()) % workers
    if type(key) is int:
        return crc32(b"i%d" % key) % workers
    return crc32(_encode(key)) % workers


def _encode(key: object) -> bytes:
    if isinstance(key, str):
        return b"s" + str.encode(key, "utf-8", "surrogatepass")
    if isinstance(key, bytes):
        return b"b" + bytes(key)
    if isinstance(key, int):  # True equals 1, so they are one key
        return b"i%d" % int(key)
    if isinstance(key, UUID):
        return b"u" + key.bytes
    if isinstance(key, (Decimal, date)):
        return _encode_value(key)
    if isinstance(key, tuple):
        parts = [_encode(part) for part in key]
        return b"t" + b"".join(b"%d:%b" % (len(part), part) for part in parts)
    raise TypeError(
        f"key {shown(key)} is of the type {type(key).__name__}, for which the default worker_number_for_key knows no "
        "number that is the same in every process: make keys of str, bytes, int, UUID and tuples of them, or pass a "
        "worker_number_for_key of your own"
    )


def _encode_value(key: Decimal | date) -> bytes:
    """Encode a value that columns hold beside texts and whole numbers."""
    if isinstance(key, datetime):
        return b"D" + (key if key.tzinfo is None else key.astimezone(UTC)).isoformat().encode()
    if isinstance(key, date):
        return b"D" + key.isoformat().encode()
    # A whole number is equal to an int. With an exponent, a short text may mean any number of digits.
    if not key:
        return b"i0"
    if key.is_finite() and key.adjusted() < _MOST_DIGITS and key == key.to_integral_value():
        return b"i%d" % int(key)
    return b"d" + str(_SHORTENED.normalize(key)).encode()
