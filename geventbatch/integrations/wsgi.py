"""Error answers for any WSGI application: Bottle, Pyramid, or none of them.

    app = ErrorAnswers(app)

What `Processor.run` raised becomes an answer that says what the client may do: 503 with Retry-After, 504, 404, or 500
when it is unknown whether anything was saved. The application has to let it through: Bottle does with
``app.catchall = False``, Pyramid does when no exception view takes it. Flask has an integration of its own.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from geventbatch.errors import BatchError
from geventbatch.integrations._answers import Answer, answer_to, log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Answer", "ErrorAnswers"]

_log = logging.getLogger("geventbatch.wsgi")


class ErrorAnswers:
    """WSGI middleware that answers the `BatchError`s of *app*.

    An error after the first bytes have been sent goes up to the server as it is, which breaks the connection off: no
    client takes half a response for a whole one. For other answers, override `answer`.

    Args:
        app: The application.
        retry_after: Whole seconds after which a client that was refused is told to come again.
    """

    def __init__(self, app: WSGIApplication, *, retry_after: int = 1) -> None:
        """Stand in front of *app*."""
        self._app = app
        self._retry_after = retry_after

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Let the application answer, or answer for it."""
        try:
            body = self._app(environ, start_response)
        except BatchError as error:
            return self.answered(error, environ, start_response)
        # Nothing runs any more behind these, and servers do better when they see what they are.
        wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(body, (list, tuple)) or (isinstance(wrapper, type) and isinstance(body, wrapper)):
            return body
        return _Body(self, body, environ, start_response)

    def answer(self, error: BatchError) -> Answer:
        """Give the answer for *error*; made to be overridden. Switches: no."""
        return answer_to(error, self._retry_after)

    def answered(self, error: BatchError, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer *error*, which is being handled, in place of what the application may have begun.

        Returns:
            The body.

        Raises:
            BatchError: *error*, when something has been sent already.
        """
        answer = self.answer(error)
        log(_log, error)
        kind, body = answer.content(environ.get("HTTP_ACCEPT"))
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        headers += answer.headers(environ.get("SERVER_SOFTWARE", ""))
        status = f"{answer.status.value} {answer.status.phrase}"
        # With this third argument a server forgets headers that it has not sent yet, and raises when it has.
        start_response(status, headers, sys.exc_info())
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]


class _Body:
    """The body of a response that the application makes while it is sent."""

    def __init__(
        self, errors: ErrorAnswers, body: Iterable[bytes], environ: WSGIEnvironment, start_response: StartResponse
    ) -> None:
        """Wrap *body*."""
        self._errors = errors
        self._body = body
        self._environ = environ
        self._start_response = start_response
        # -- mutable state ---------------------------------------------------------------------------------
        self._chunks: Iterator[bytes] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            if self._chunks is None:
                self._chunks = iter(self._body)
            return next(self._chunks)
        except BatchError as error:
            self._chunks = iter(self._errors.answered(error, self._environ, self._start_response))
        return next(self._chunks)

    def close(self) -> None:
        """Close what the application gave, as WSGI asks for, on every path."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
