"""What a wallet refuses to do, and how an HTTP client is told."""

from collections.abc import Callable
from http import HTTPStatus

from django.db import IntegrityError
from django.http import HttpRequest, HttpResponse, JsonResponse

from geventbatch import ResourceMissing


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


class Refusals:
    """A middleware that answers what was refused, by an operation or by a constraint of the database behind it."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        """Nothing to do before or after a view."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Answer as JSON; None leaves it to `geventbatch.integrations.django.middleware.ErrorAnswers`, and Django."""
        if isinstance(error, ResourceMissing):
            return _answer(UnknownAccount(f"there is no account {error.key}"))
        if isinstance(error, IntegrityError):
            return _answer(Refused("a constraint of the database does not allow it"))
        return _answer(error) if isinstance(error, Refused) else None


def _answer(refused: Refused) -> HttpResponse:
    return JsonResponse({"error": type(refused).__name__, "detail": str(refused)}, status=refused.status)
