"""What the environment decides."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIGURATION = Path(__file__).with_name("gunicorn.conf.py")
"""That of gunicorn."""

TRAINS = {
    "ICE 1": 400,
    "Glacier Express": 240,
    "Night Train": 120,
    "Rack Railway": 30,
}
"""The trains that run, and how many seats each has."""


@dataclass(frozen=True)
class Settings:
    """Where the trains are kept, and how their operations are run."""

    database_url: str = "sqlite:///tickets.sqlite"
    batching: bool = True
    max_pending: int = 1000
    """Operations that may wait in one worker process; whoever comes then is told to come again."""
    max_duration: float = 5.0
    """Seconds for one batch: more than it needs on a bad day, and well under gunicorn's graceful_timeout."""
    admin_addresses: frozenset[str] = frozenset({"127.0.0.1", "::1"})
    """From where the page of the batches may be seen."""
    backend: str = ""
    """What each answer names in its header X-Backend, where several serve the same trains."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """What is not set keeps its default.

        DATABASE_URL, BATCHING=off, MAX_PENDING, MAX_DURATION, ADMIN_ADDRESSES (with commas), BACKEND.
        """
        return cls(
            database_url=environment.get("DATABASE_URL", cls.database_url),
            batching=_is_on(environment.get("BATCHING", "on")),
            max_pending=int(environment.get("MAX_PENDING", cls.max_pending)),
            max_duration=float(environment.get("MAX_DURATION", cls.max_duration)),
            admin_addresses=_addresses(environment["ADMIN_ADDRESSES"])
            if "ADMIN_ADDRESSES" in environment
            else cls.admin_addresses,
            backend=environment.get("BACKEND", cls.backend),
        )


def _addresses(text: str) -> frozenset[str]:
    return frozenset(filter(None, map(str.strip, text.split(","))))


def _is_on(word: str) -> bool:
    if word not in ("on", "off"):
        raise ValueError(f"BATCHING is on or off, not {word!r}")
    return word == "on"
