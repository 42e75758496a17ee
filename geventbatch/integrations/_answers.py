"""Answers to HTTP clients whose operations failed: one table for every framework.

An error's message names the key and quotes the database. It goes to the log. The client is told what it may do now.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING

from geventbatch._safe_repr import said, shown
from geventbatch._watch.log import SHOWN_BEFORE, has_place, is_due, shows_again
from geventbatch.errors import (
    BatchError,
    BatchTimeout,
    IdempotencyKeyReused,
    OperationCancelled,
    ProcessorOverloaded,
    ProcessorStopped,
    ResourceMissing,
)

if TYPE_CHECKING:
    from logging import Logger

_LONGEST_WAIT = 60.0
"""Seconds. The measured rate behind a longer wait says little about a time so far ahead."""

_AGAIN = "nothing was changed; please try again"
_SHOWN = "__geventbatch_shown__"
_AT_THE_DOOR = (ProcessorStopped, ProcessorOverloaded, OperationCancelled)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response, still without a format.

    Attributes:
        status: 404, 422, 500, 503 or 504.
        error: What happened, as a name for programs: 'ResourceMissing', 'IdempotencyKeyReused', 'TryAgain' or
            'OutcomeUnknown'.
        detail: The same for people, and what the client may do now.
        retry_safe: True when certainly nothing was saved.
        retry_after: Seconds for a Retry-After header; None for no such header.
        close: True if this server ends: the client's next request should use another connection.
    """

    status: HTTPStatus
    error: str
    detail: str
    retry_safe: bool
    retry_after: int | None = None
    close: bool = False

    def content(self, accept: str | None) -> tuple[str, bytes]:
        """Return content type and body for a client that sent the Accept header *accept*."""
        if not prefers_json(accept):
            return "text/plain; charset=utf-8", f"{self.error}: {self.detail}\n".encode()
        told = {"error": self.error, "detail": self.detail, "retry_safe": self.retry_safe}
        return "application/json", json.dumps(told).encode() + b"\n"

    def headers(self, server_software: str) -> list[tuple[str, str]]:
        """Return the headers, without the body's, for the server *server_software* (SERVER_SOFTWARE)."""
        headers = [("Vary", "Accept")]
        if self.retry_after is not None:
            headers.append(("Retry-After", str(self.retry_after)))
        # wsgiref raises at this header, and keeps no connections anyway.
        if self.close and not server_software.startswith("WSGIServer/"):
            headers.append(("Connection", "close"))
        return headers


def answer_to(error: BatchError, retry_after: int) -> Answer:
    """Return the answer to *error*. *retry_after* is in seconds; an overloaded processor may ask for more."""
    if isinstance(error, ProcessorOverloaded):
        retry_after = max(retry_after, ceil(min(error.retry_after, _LONGEST_WAIT)))
    if isinstance(error, ResourceMissing):
        return Answer(HTTPStatus.NOT_FOUND, "ResourceMissing", "there is no such resource", retry_safe=True)
    if isinstance(error, IdempotencyKeyReused):
        reused = "the idempotency key was used for something else; nothing was changed"
        return Answer(HTTPStatus.UNPROCESSABLE_ENTITY, "IdempotencyKeyReused", reused, retry_safe=True)
    if not error.retry_safe:
        unknown = "it may be saved or not; look before you try again"
        return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "OutcomeUnknown", unknown, retry_safe=False)
    if isinstance(error, BatchTimeout):
        return Answer(HTTPStatus.GATEWAY_TIMEOUT, "TryAgain", f"it took too long; {_AGAIN}", retry_safe=True)
    return Answer(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "TryAgain",
        _AGAIN,
        retry_safe=True,
        retry_after=retry_after,
        close=isinstance(error, ProcessorStopped),
    )


def log(logger: Logger, error: BatchError, method: str, path: str) -> None:
    """Log *error*, the answer to a request by *method* for *path*.

    A cause that many callers share is at level ERROR once, for the other callers at INFO.
    The traceback is logged too, unless the same one was in the last minute. Operations refused at the door, of which
    there may be many in a second, are logged at INFO. A missing resource or a reused idempotency key is the client's
    error, and is not logged.
    """
    if isinstance(error, (ResourceMissing, IdempotencyKeyReused)):
        return
    told = f"{method} {shown(path)}: {type(error).__name__}: {said(error)}"  # quoted: a path may have line breaks
    if isinstance(error, _AT_THE_DOOR) or not _is_news(error):
        logger.info(told)
        return
    cause, phase = error.__cause__ or error, error.phase if isinstance(error, BatchTimeout) else None
    if is_due(logger.name, phase, *shows_again(cause)):
        logger.error(told, exc_info=error)
    elif has_place(cause):
        told += SHOWN_BEFORE
        logger.error(told)
    else:  # another batch's code, which ran at its deadline, was as silent about its place
        logger.error(told)


def _is_news(error: BatchError) -> bool:
    # Each caller has its own error, but all share its cause.
    marks = vars(error.__cause__ or error)
    known = _SHOWN in marks
    marks[_SHOWN] = True
    return not known


# -- the Accept header ----------------------------------------------------------------------------------------


def prefers_json(accept: str | None) -> bool:
    """Return whether a client that sent *accept* wants JSON. Browsers and terminals ask for text by name."""
    ranges = _ranges(accept or "*/*")
    return _quality(ranges, "application/json") >= max(
        _quality(ranges, "text/plain"),
        _quality(ranges, "text/html"),
    )


def _ranges(accept: str) -> dict[str, float]:
    """Return the quality of each media range."""
    ranges = {}
    for part in accept.lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        ranges[media] = min((_q(parameter) for parameter in parameters), default=1.0)
    return ranges


def _q(parameter: str) -> float:
    name, _, value = parameter.partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0


def _quality(ranges: dict[str, float], media: str) -> float:
    """Return the quality of *media*, by the most specific range that includes it."""
    kind = media.partition("/")[0]
    for pattern in (media, f"{kind}/*", "*/*"):
        if pattern in ranges:
            return ranges[pattern]
    return 0.0
