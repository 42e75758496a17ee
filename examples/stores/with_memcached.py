"""Documents in memcached, with pymemcache. The kind: compare and set, by memcached's ``cas``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymemcache.client.base import Client

from geventbatch import Conflict
from geventbatch.scopes import OnServer


class Documents:
    """A store: ``Processor(open_resource=Documents(("127.0.0.1", 11211)), …)``. It forgets what memcached forgets."""

    on_server = True

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._idle: list[Client] = []  # one client is for one greenlet

    @contextmanager
    def __call__(self, key: str) -> Iterator[dict[str, Any]]:
        """Load the document; at the end of the block, save it unless somebody else has changed it."""
        with self._lent() as client:
            loaded, version = client.gets(key)
        document: dict[str, Any] = {} if loaded is None else json.loads(loaded)
        yield document
        text = json.dumps(document)
        with self._lent() as client:
            # Without noreply=False, add() says True and asks nobody. A lost answer raises: neither of the two is sent
            # again by the client, so that what is refused here was not our own.
            if version is None:
                saved = client.add(key, text, noreply=False)
            else:
                saved = client.cas(key, text, version, noreply=False)
        if not saved:  # False: it was changed; None: it is gone
            raise Conflict(f"{key} was not saved: somebody else has changed it meanwhile")

    @contextmanager
    def _lent(self) -> Iterator[Client]:
        """Lend a client. One that was interrupted, by a Timeout too, would read the answer to another question."""
        client = self._idle.pop() if self._idle else Client(self._server)
        try:
            yield client
        except BaseException:
            client.close()
            raise
        self._idle.append(client)

    def stopped(self) -> None:
        """End the connections when the processor has stopped."""
        while self._idle:
            self._idle.pop().close()


_: type[OnServer] = Documents  # a type checker compares the store with what it says it has
