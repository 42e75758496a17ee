"""A database URL as Django's settings have it."""

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CONNECTIONS = 20
"""In each process: PostgreSQL starts out with 100 for all together."""


def database(url: str) -> dict[str, Any]:
    """The settings for ``sqlite:///relative``, ``sqlite:////absolute`` or ``postgresql://user:password@host:port/name``."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": parts.path[1:],
            # With a write-ahead log, readers wait for nobody.
            "OPTIONS": {"init_command": "PRAGMA journal_mode = WAL"},
        }
    if parts.scheme not in ("postgres", "postgresql"):
        raise ValueError(f"DATABASE_URL is {url!r}, but must begin with sqlite:/// or postgresql://")
    query = parse_qs(parts.query)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path[1:],
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        # A directory, for a socket, does not fit between // and /.
        "HOST": query.get("host", [parts.hostname or ""])[0],
        "PORT": query.get("port", [str(parts.port or "")])[0],
        # Each request that reads would open a connection, and without batches each that writes.
        "OPTIONS": {"pool": {"min_size": 0, "max_size": CONNECTIONS, "timeout": 10}},
    }
