"""What a wallet refuses to do, and how an HTTP client is told."""

import logging
from collections.abc import Callable
from http import HTTPStatus

from django.db import IntegrityError
from django.http import HttpRequest, HttpResponse, JsonResponse

from geventbatch import BatchError, ResourceMissing

_log = logging.getLogger(__name__)


class Refused(Exception):
    """What was asked for cannot be done, and nothing was changed."""

    status = HTTPStatus.CONFLICT


class InsufficientFunds(Refused):
    """The account has not got that much."""


class ReferenceUsed(Refused):
    """The reference belongs to another movement."""


class UnknownAccount(Refused):
    """There is no such account."""

    status = HTTPStatus.NOT_FOUND


class NotUnderstood(Refused):
    """What was sent makes no sense."""

    status = HTTPStatus.BAD_REQUEST


class Answers:
    """A middleware that answers what was refused, by an operation or by a constraint, and operations that failed."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Nothing to do before or after a view."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:  # noqa: ARG002
        """Answer as JSON; None leaves it to Django."""
        if isinstance(error, Refused):
            return _problem(error.status, type(error).__name__, str(error))
        if isinstance(error, IntegrityError):
            return _problem(HTTPStatus.CONFLICT, "RefusedByDatabase", "a constraint does not allow it")
        if isinstance(error, ResourceMissing):
            return _problem(HTTPStatus.NOT_FOUND, "UnknownAccount", f"there is no account {error.key}")
        if isinstance(error, BatchError):
            return _not_answered(error)
        return None


def _not_answered(error: BatchError) -> HttpResponse:
    """The batch failed. Whether anything was saved decides what the client may do."""
    _log.warning("%s: %s (%r)", type(error).__name__, error, error.__cause__)
    if not error.retry_safe:
        return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "OutcomeUnknown", "ask again with the same reference")
    answer = _problem(HTTPStatus.SERVICE_UNAVAILABLE, "TryAgain", "nothing was changed; please try again")
    answer["Retry-After"] = "1"
    return answer


def _problem(status: HTTPStatus, error: str, detail: str) -> HttpResponse:
    return JsonResponse({"error": error, "detail": detail}, status=status)
