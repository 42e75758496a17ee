"""What the driver tells the workers of gunicorn, through one variable of the environment."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

VARIABLE: Final = "CHAOS"

DEADLINES: Final = {"calm": 2.0, "tight": 0.2, "squeezed": 0.04}
"""Seconds: the `max_duration` of the processors of each worker."""

MUTANTS: Final = ("no-conflicts", "lying", "early", "forgetful", "trusting", "halves")
"""See `mutants`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the application is to run."""

    store: str
    url: str
    """Of the proxy before the server."""
    directory: str
    """Where workers say that they live, and how they are."""
    mutant: str | None = None
    idempotent: bool = True
    """The store takes idempotency keys."""
    transfers: bool = False
    """Entries are lines of accounts, most of them in several ones."""
    rows: bool = True
    """Each entry brings a row beside its resource."""
    workers: int = 3
    keepalive: int = 5
    """Seconds after which gunicorn ends a connection that is not used."""
    max_pending: int | None = None
    max_batch_size: int | None = None
    watched: float = 0.0
    """Seconds between two looks of a worker at itself; 0: it never looks."""

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def settings() -> Settings:
    """What this process was told."""
    told: dict[str, Any] = json.loads(os.environ[VARIABLE])
    assert set(told) == {field.name for field in fields(Settings)}
    return Settings(**told)
