"""A WSGI application whose metrics are shown at /metrics, of whichever worker is asked, for all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import gevent
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from geventbatch import Processor
from geventbatch.integrations import prometheus

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

prometheus.watch()


def load(key: str) -> None:
    gevent.sleep(1000 if key == "hang" else 0.005)


def save(key: str, resource: None) -> None:
    if key == "broken":
        raise OSError("disk full")


processor: Processor[None] = Processor(
    load_resource=load, save_resource=save, min_duration=0, max_duration=1000, name="trains"
)


def apply(resource: None, key: str) -> None:
    if key == "raise":
        raise KeyError(key)


def answer(key: str) -> bytes:
    try:
        processor.run(key, apply, key)
    except Exception as error:
        return type(error).__name__.encode()
    return str(os.getpid()).encode()


def metrics() -> bytes:
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    path = environ["PATH_INFO"].removeprefix("/")
    body = metrics() if path == "metrics" else answer(path)
    start_response("200 OK", [("Content-Type", CONTENT_TYPE_LATEST), ("Content-Length", str(len(body)))])
    return [body]
