"""What an HTTP client is to be told of each error, in every framework."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from geventbatch import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    IdempotencyKeyReused,
    LoadFailed,
    OperationCancelled,
    ProcessorOverloaded,
    ProcessorStopped,
    ResourceMissing,
    SaveFailed,
)
from geventbatch.errors import ImpossibleKey

Make = Callable[[], BatchError]


class Told(NamedTuple):
    status: int
    error: str
    retry_safe: bool
    headers: dict[str, str]


AGAIN = Told(503, "TryAgain", retry_safe=True, headers={"Retry-After": "1"})
ENDING = Told(503, "TryAgain", retry_safe=True, headers={"Retry-After": "1", "Connection": "close"})
LATE = Told(504, "TryAgain", retry_safe=True, headers={})
UNKNOWN = Told(500, "OutcomeUnknown", retry_safe=False, headers={})
REUSED = Told(422, "IdempotencyKeyReused", retry_safe=True, headers={})
MISSING = Told(404, "ResourceMissing", retry_safe=True, headers={})

CASES: dict[str, tuple[Make, Told]] = {
    "overloaded": (lambda: ProcessorOverloaded("secret"), AGAIN),
    "stopped": (lambda: ProcessorStopped("secret"), ENDING),
    "cancelled": (lambda: OperationCancelled("secret"), AGAIN),
    "load failed": (lambda: LoadFailed("secret", retry_safe=True), AGAIN),
    "not saved": (lambda: SaveFailed("secret", retry_safe=True), AGAIN),
    "killed in an operation": (lambda: BatchAborted("secret", retry_safe=True), AGAIN),
    "late in a load": (lambda: BatchTimeout("secret", retry_safe=True, phase="load"), LATE),
    "late in an operation": (lambda: BatchTimeout("secret", retry_safe=True, phase="operations"), LATE),
    "late in a save": (lambda: BatchTimeout("secret", retry_safe=False, phase="save"), UNKNOWN),
    "save failed": (lambda: SaveFailed("secret", retry_safe=False), UNKNOWN),
    "killed in a save": (lambda: BatchAborted("secret", retry_safe=False), UNKNOWN),
    "reused": (lambda: IdempotencyKeyReused("secret"), REUSED),
    "missing": (lambda: ResourceMissing("secret"), MISSING),
    "no key of the table": (lambda: ImpossibleKey("secret"), MISSING),
}

each_error = pytest.mark.parametrize(("make", "told"), CASES.values(), ids=CASES)

ACCEPTS = {
    "": "json",
    "*/*": "json",
    "application/json": "json",
    "application/json, text/plain, */*": "json",
    "application/*;q=0.8, text/plain;q=0.5": "json",
    "image/png": "json",
    "text/plain": "text",
    "TEXT/Plain ; Q=0.9, application/json;q=0.8": "text",
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": "text",
    "text/*, application/json;q=broken": "text",
}

each_accept = pytest.mark.parametrize(("accept", "form"), ACCEPTS.items(), ids=str)


def check(told: Told, status: int, headers: dict[str, str], body: bytes) -> None:
    """Compare an answer in JSON with what was to be told."""
    sent = json.loads(body)
    assert (status, sent["error"], sent["retry_safe"]) == (told.status, told.error, told.retry_safe)
    expected = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Vary": "Accept", **told.headers}
    assert headers == expected
    assert sent.keys() == {"error", "detail", "retry_safe"}
    assert ("it may be saved or not" in sent["detail"]) is not told.retry_safe
    assert b"secret" not in body


def form_of(kind: str, body: bytes) -> str:
    """Say whether it is an answer as 'json' or as 'text', which are about the same thing."""
    if kind == "application/json":
        sent: dict[str, Any] = json.loads(body)
        assert sent["error"] == "TryAgain"
        return "json"
    assert kind == "text/plain; charset=utf-8"
    assert body == b"TryAgain: nothing was changed; please try again\n"
    return "text"
