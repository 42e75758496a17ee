"""A page with the present state of the processors, for one's own admin: a WSGI application.

    page = Page(allow=lambda environ: environ.get("REMOTE_ADDR") == "127.0.0.1")

It shows rates, the hottest keys, the sizes of batches, where their time goes, what hangs and since when, and recent
failures. It is about the process that answers: under several workers, each has its own numbers. docs/page.md says how
to mount it.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakMethod, finalize

from geventbatch import _seam
from geventbatch._core import process
from geventbatch._processor import Processor
from geventbatch._safe_repr import shown
from geventbatch._watch.setup_check import check_setup
from geventbatch.integrations.page.assets import HEADERS
from geventbatch.integrations.page.history import Seen, live_of
from geventbatch.integrations.page.html import Gathered, document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

__all__ = ["Page"]


class Page:
    """A WSGI application that shows the state of processors. It counts from its making on.

    Args:
        allow: ``allow(environ)`` returns True for a viewer who may see it. Anything else is answered by an empty 403.
        processors: The processors to show; by default all in the process, those made later too.

    Raises:
        TypeError: *allow* cannot be called, or one of *processors* is no `Processor`.
    Switches: no.
    """

    def __init__(
        self, *, allow: Callable[[WSGIEnvironment], bool], processors: Iterable[Processor[Any]] | None = None
    ) -> None:
        """See the class."""
        if not callable(allow):
            raise TypeError(f"allow is {shown(allow)}, but must be a callable that is given the WSGI environ")
        self._allow = allow
        # -- mutable state ---------------------------------------------------------------------------------
        self._seen: WeakKeyDictionary[Processor[Any], Seen] = WeakKeyDictionary()
        for processor in process.processors() if processors is None else processors:
            if not isinstance(processor, Processor):
                raise TypeError(f"processors has {shown(processor)}, but must have instances of Processor only")
            self._watch(processor)
        if processors is None:
            self._watch_later_ones()

    def __repr__(self) -> str:
        """Say how many processors it shows."""
        return f"<Page of {len(self._seen)} processors>"

    def _watch_later_ones(self) -> None:
        method = WeakMethod(self._watch)

        def watch(processor: Processor[Any]) -> None:
            if (living := method()) is not None:
                living(processor)

        process.watchers.append(watch)
        finalize(self, process.watchers.remove, watch).atexit = False

    def _watch(self, processor: Processor[Any]) -> None:
        seen = self._seen[processor] = Seen()
        _seam.watch(processor, seen)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer as a WSGI application. Switches: no; but *allow* may, and the `repr` of a key."""
        status, headers, body = self.answer(environ)
        start_response(status, headers)
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    def answer(self, environ: WSGIEnvironment) -> tuple[str, list[tuple[str, str]], bytes]:
        """Return status, headers and body: for a view of a framework that mounts no WSGI application.

        Raises:
            Exception: The error that *allow* raised.
        Switches: as *allow* does.
        """
        if self._allow(environ) is not True:
            return _empty("403 Forbidden")
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _empty("405 Method Not Allowed", ("Allow", "GET, HEAD"))
        body = self._html().encode("utf-8", "backslashreplace")
        return "200 OK", [("Content-Type", "text/html; charset=utf-8"), *HEADERS, _length(body)], body

    def _html(self) -> str:
        # Gather everything first: showing a key may run code of the user's, which may switch.
        gathered = sorted(
            (
                Gathered(processor.name, _state_of(processor), processor.stats(), seen.now(), live_of(processor))
                for processor, seen in list(self._seen.items())
            ),
            key=itemgetter(0),
        )
        return document(gathered, check_setup())


def _empty(status: str, *headers: tuple[str, str]) -> tuple[str, list[tuple[str, str]], bytes]:
    # With a content type, which WSGI wants wherever there might be content.
    return status, [("Content-Type", "text/plain"), ("Cache-Control", "no-store"), *headers, _length(b"")], b""


def _length(body: bytes) -> tuple[str, str]:
    return "Content-Length", str(len(body))


def _state_of(processor: Processor[Any]) -> str:
    state = _seam.dispatcher_of(processor)
    if state.stopping:
        return "stopped" if state.ended else "stopping"
    return "running" if processor.batching else "batching off"
