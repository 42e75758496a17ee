"""Error answers: put ``geventbatch.integrations.django.middleware.ErrorAnswers`` last into ``MIDDLEWARE``.

An error that `Processor.run` raised in a view becomes an answer that tells the client what it may do: 503 with
Retry-After, 504, 404, or 500 if it is unknown whether anything was saved; in JSON or as text, as the client prefers.
The answers are the same as in Flask and plain WSGI.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from django.conf import settings
from django.http import HttpResponse

from geventbatch.errors import BatchError
from geventbatch.integrations._answers import Answer, answer_to, log

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest
    from django.http.response import HttpResponseBase

__all__ = ["Answer", "ErrorAnswers"]

_log: Final = logging.getLogger("geventbatch.django")


class ErrorAnswers:
    """Middleware that answers the `BatchError`s of views.

    ``settings.GEVENTBATCH_RETRY_AFTER`` is the number of seconds (int, default 1) after which a refused client is told
    to try again; an overloaded processor may ask for more. For other answers, override `answer`.
    """

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        """Wrap *get_response*."""
        self._get_response = get_response
        self._retry_after = int(getattr(settings, "GEVENTBATCH_RETRY_AFTER", 1))

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Call the view. Switches: as it does."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Answer in place of a view that raised a `BatchError`. Switches: no."""
        if not isinstance(exception, BatchError):
            return None
        log(_log, exception, str(request.method), request.path)
        answer = self.answer(exception)
        content_type, body = answer.content(request.headers.get("Accept"))
        response = HttpResponse(body, status=answer.status, content_type=content_type)
        response["Content-Length"] = str(len(body))
        for name, value in answer.headers(request.META.get("SERVER_SOFTWARE", "")):
            response[name] = value
        return response

    def answer(self, error: BatchError) -> Answer:
        """Return the answer to *error*; made to be overridden. Switches: no."""
        return answer_to(error, self._retry_after)
