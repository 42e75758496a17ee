"""Our own stores on the bench of `geventbatch.testing.store_contract`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from geventbatch.testing import StoreBench
from tests.support.adapters.base import case_named
from tests.support.adapters.django import MARKERS
from tests.support.adapters.redis import LOAD, SAVE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch import Processor
    from geventbatch.testing._proxy import Endpoint
    from tests.support.adapters.base import Adapter

_LOADS: Final = {
    "sqlalchemy-document": b"FROM documents",
    "sqlalchemy-mapped": b"FROM purses",
    "django": MARKERS["load"],
    "redis": LOAD,
    "sql-": b"FROM purses",
}
"""The markers of loads, by the beginning of a case's name."""

beside: Final[dict[str, Adapter]] = {}
"""The adapters that read and write beside the stores, by the address of their place, while a test has them open."""


class CaseBench(StoreBench):
    """A case of the suite of our own stores (tests/stores/test_stores.py)."""

    def __init__(self, name: str, address: str = "") -> None:
        self._name = name
        self._address = address
        if case_named(name).has_proxy:
            (self.load_marker,) = [marker for begin, marker in _LOADS.items() if name.startswith(begin)]
            self.save_marker, self.save_answer = (SAVE, b"") if name.startswith("redis") else (b"COMMIT\x00", b"COMMIT")
            if name.endswith("mariadb"):
                self.save_marker, self.save_answer = b"\x03COMMIT", b""
                self.load_marker = self.load_marker.replace(b'"', b"`")
        if address in beside and (proxy := beside[address].proxy) is not None:
            self.server = proxy._server

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Adapter]:
        with case_named(self._name).opens(self._address) as adapter:
            if adapter.proxy is not None and server is not None:
                adapter.proxy._server = server  # behind it is the contract's
            yield adapter

    def processor(self, store: Adapter, /, **options: Any) -> Processor[Any]:
        return store.processor(missing="make", **options)

    def add(self, resource: Any, amount: int, /) -> int:
        return case_add(self._name, resource, amount)

    def get(self, key: str, /) -> int | None:
        return beside[self._address].get(key)

    def put(self, key: str, total: int, /) -> None:
        beside[self._address].put(key, total)


def case_add(name: str, resource: Any, amount: int) -> int:
    """Add to the total: of a mapped class or a model it is an attribute, of a document an entry."""
    if name.startswith(("sqlalchemy-mapped", "django", "sql-")):
        resource.total += amount
        return int(resource.total)
    resource["total"] += amount
    return int(resource["total"])
