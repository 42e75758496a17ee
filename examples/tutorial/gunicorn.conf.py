"""One worker: a key's requests share a batch in one process."""

from typing import Any

from geventbatch.integrations.gunicorn import *  # noqa: F403 - as its docstring says

workers = 1
worker_connections = 1000


def when_ready(server: Any) -> None:
    """Say where it listens."""
    print("listening on", *server.LISTENERS, flush=True)
