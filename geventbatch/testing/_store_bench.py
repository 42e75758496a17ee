"""`StoreBench`: what `store_contract` needs to know of a store, written by the store's author."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from geventbatch._processor import Processor

if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager

    from geventbatch.testing._proxy import Endpoint


class StoreBench(ABC):
    """The parts of a test that only the author of a store can write. Derive a class, and pass it to `store_contract`.

    The contract knows one whole number of each resource, its total. Define the class at the top of a module: another
    process makes a copy of the bench by ``pickle``. So keep names and addresses in it, no connections.

    Attributes:
        server: The address of the database server: host and port, or the path of its Unix socket. None: the store has
            no server (SQLite), and no connection is broken.
        load_marker: Bytes that are in the message with which the store loads, and in no other message.
        save_marker: Bytes that are in the message with which the store saves a resource that exists, and in no other
            message; of a transaction, they are in COMMIT. The connection has to be without TLS.
        save_answer: Bytes that are in the server's answer to it. Needed only if the answer comes in several pieces.
        max_batches: The number of batches that can run at once: so many connections the store has. With 1, batches of
            different keys never run side by side, and checks that need that are left out.
    """

    server: Endpoint | None = None
    load_marker: bytes = b""
    save_marker: bytes = b""
    save_answer: bytes = b""
    max_batches: int = 4

    @abstractmethod
    def open_store(self, server: Endpoint | None, /) -> AbstractContextManager[Any]:
        """Return a context manager that gives a new store, with connections of its own, and closes them at its end.

        Called several times in one process, and in another process.

        Args:
            server: The address to connect to: `server`, or a host and port that lead there.

        Returns:
            A context manager of what a processor takes as ``open_resource``.
        Switches: yes.
        """
        raise NotImplementedError

    @abstractmethod
    def add(self, resource: Any, amount: int, /) -> int:
        """Add *amount* to the total, and return the new total. It is run as an operation. Switches: no."""
        raise NotImplementedError

    @abstractmethod
    def get(self, key: Any, /) -> int | None:
        """Return the total that is saved at *key*, read by other means than the store. None: there is no resource.

        Switches: yes.
        """
        raise NotImplementedError

    @abstractmethod
    def put(self, key: Any, total: int, /) -> None:
        """Save a resource with *total* at *key*, as another program does: over what is there, and beside the store.

        It may wait while a batch has the row locked. If the store compares a version, it counts that up. Switches: yes.
        """
        raise NotImplementedError

    def key(self, number: int, /) -> Hashable:
        """Return the key of this *number*, 1 to 2,147,483,647, which no other check uses. By default, it is a text."""
        return str(number)

    def violate(self, resource: Any, /) -> Any:
        """Change the resource so that the database refuses to save it, by a constraint. It is run as an operation.

        If you do not write it, that is not checked. Switches: no.
        """
        raise NotImplementedError

    def processor(self, store: Any, /, **options: Any) -> Processor[Any]:
        """Return a processor over *store*, with *options* of `Processor`. Write it for a pair, or to add options."""
        return Processor(open_resource=store, **options)
