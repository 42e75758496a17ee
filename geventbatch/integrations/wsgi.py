"""Error answers for any WSGI application: Bottle, Pyramid, or none of them.

    app = ErrorAnswers(app)

An error that `Processor.run` raised becomes an answer that tells the client what it may do: 503 with Retry-After, 504,
404, or 500 if it is unknown whether anything was saved. The application has to let the error through: Bottle does with
``app.catchall = False``, Pyramid does if no exception view takes it. Flask has an integration of its own.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Final

from geventbatch._watch.setup_problems import see_environment
from geventbatch.errors import BatchError
from geventbatch.integrations._answers import Answer, answer_to, log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from _typeshed import OptExcInfo

__all__ = ["Answer", "ErrorAnswers"]

_CATCHES_ALL: Final = (
    "Bottle catches every exception of a view itself, and ErrorAnswers sees none: an unknown outcome and a missing "
    "resource are Bottle's 500 in HTML. Set app.catchall = False."
)

_log = logging.getLogger("geventbatch.wsgi")


class ErrorAnswers:
    """WSGI middleware that answers the `BatchError`s of *app*.

    If an error comes after the first bytes have been sent, it goes up to the server, which closes the connection: no
    client takes half a response for a whole one. For other answers, override `answer`.

    Args:
        app: The application.
        retry_after: Seconds (int) after which a refused client is told to try again; an overloaded processor may
            ask for more.
    """

    def __init__(self, app: WSGIApplication, *, retry_after: int = 1) -> None:
        """Wrap *app*."""
        self._app = app
        self._retry_after = retry_after
        # -- mutable state ---------------------------------------------------------------------------------
        self._looked = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application, and answer for it if it raises a `BatchError`."""
        if not self._looked:
            self._looked = True
            see_environment(environ)
            if getattr(self._app, "catchall", None) is True:
                warnings.warn(_CATCHES_ALL, RuntimeWarning, stacklevel=2)
        response = _Response(environ, start_response)
        try:
            body = self._app(environ, response.begin)
        except BatchError as error:
            return _answered(self, error, response)
        # No code of the application runs behind these, and servers treat them better when they see the type.
        wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(body, (list, tuple)) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
            response.send_head()
            return body
        return _Body(self, body, response)

    def answer(self, error: BatchError) -> Answer:
        """Return the answer to *error*; made to be overridden. Switches: no."""
        return answer_to(error, self._retry_after)


def _answered(errors: ErrorAnswers, error: BatchError, response: _Response) -> Iterable[bytes]:
    """Answer *error* in place of the response begun, and return the body. Raise it if something has been sent."""
    if response.sent:
        raise error
    answer = errors.answer(error)
    environ = response.environ
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    log(_log, error, environ.get("REQUEST_METHOD", ""), path)
    kind, body = answer.content(environ.get("HTTP_ACCEPT"))
    headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
    headers += answer.headers(environ.get("SERVER_SOFTWARE", ""))
    response.replace(f"{answer.status.value} {answer.status.phrase}", headers)
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]


class _Response:
    """The head of a response, held back until there is something to send.

    WSGI lets an application replace the head until then, but gunicorn would send the headers of both.
    """

    def __init__(self, environ: WSGIEnvironment, start_response: StartResponse) -> None:
        self.environ = environ
        self._start_response = start_response
        # -- mutable state ---------------------------------------------------------------------------------
        self.sent = False
        self._head: tuple[str, list[tuple[str, str]]] | None = None
        self._write: Callable[[bytes], object] | None = None

    def begin(
        self, status: str, headers: list[tuple[str, str]], exc_info: OptExcInfo | None = None, /
    ) -> Callable[[bytes], object]:
        """Act as the application's ``start_response``."""
        if self.sent and exc_info is not None:
            return self._start_response(status, headers, exc_info)
        if self._head is not None and exc_info is None:
            raise AssertionError("start_response() was called twice, and without exc_info")
        self._head = status, headers
        return self._write_through

    def send_head(self) -> None:
        """Send the head to the server, unless it was sent."""
        if not self.sent and self._head is not None:
            self.sent = True
            self._write = self._start_response(*self._head)

    def replace(self, status: str, headers: list[tuple[str, str]]) -> None:
        """Send this head instead of the one begun."""
        self._head = status, headers
        self.send_head()

    def _write_through(self, chunk: bytes) -> None:
        self.send_head()
        if self._write is not None:
            self._write(chunk)


class _Body:
    """The body of a response that the application makes while it is sent."""

    def __init__(self, errors: ErrorAnswers, body: Iterable[bytes], response: _Response) -> None:
        """Wrap *body*."""
        self._errors = errors
        self._body = body
        self._response = response
        # -- mutable state ---------------------------------------------------------------------------------
        self._chunks: Iterator[bytes] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        chunk = self._next()
        self._response.send_head()
        if chunk is None:
            raise StopIteration
        return chunk

    def _next(self) -> bytes | None:
        """Return the next chunk that is not empty."""
        try:
            if self._chunks is None:
                self._chunks = iter(self._body)
            return next(filter(None, self._chunks), None)
        except BatchError as error:
            self._chunks = iter(_answered(self._errors, error, self._response))
        return next(self._chunks, None)

    def close(self) -> None:
        """Close the application's body, as WSGI demands on every path."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
