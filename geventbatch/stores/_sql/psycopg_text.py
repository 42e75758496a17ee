"""Statements with their values put into them by psycopg 3, so that several fit into one message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg.adapt import Transformer
from psycopg.types.numeric import FloatDumper

from geventbatch.stores._sql import bounds
from geventbatch.stores._sql.joined import named

if TYPE_CHECKING:
    from collections.abc import Iterable


def join_each(driver: psycopg.Connection[Any], query: str, every: Iterable[Any]) -> list[str]:
    """Return *query*, a statement or a part of one, with each of these values. Switches: no."""
    every = list(every)
    text = named(query) if every and type(every[0]) is dict else None
    if text is not None:
        transformer = Transformer(driver)
        texts = [text.of(params, transformer) for params in every]
        if None not in texts:
            return cast("list[str]", texts)
    cursor = psycopg.ClientCursor(driver)  # tells also what is wrong
    for params in every:
        values = params.values() if isinstance(params, dict) else params or ()
        if any(isinstance(value, float) for value in values):
            cursor.adapters.register_dumper(float, _Float)
            break
    return [cursor.mogrify(cast("bytes", query), params) for params in every]


def encoded(driver: psycopg.Connection[Any], statements: list[str]) -> bytes:
    """Return *statements* as one message. Switches: no."""
    return bounds.SEPARATOR.join(statements).encode(driver.info.encoding)


class _Float(FloatDumper):
    """Casts a float: a bare number in SQL is a decimal, which has no -0.0 and is rounded differently."""

    def quote(self, obj: Any) -> bytes:
        return b"'%s'::float8" % bytes(self.dump(obj) or b"")
