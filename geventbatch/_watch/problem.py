"""A problem of a set-up, and its warning."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SetupProblem:
    """A problem of a set-up that makes batches slow, wrong after a fork, or lose answered changes.

    Attributes:
        name: For programs: 'unpatched', 'patched-late', 'fork-unpatched', 'forked-late', 'forked-connections',
            'forked-pool', 'psycopg', 'psycopg2', 'mysqlclient', 'mysql-connector' or 'huey_consumer'; under uWSGI
            'killed-batches', 'uwsgi-router' or 'uwsgi-atexit'; of the Prometheus exporter 'prometheus-dead'; of an
            engine 'pooler'; of a processor 'unsaved', 'uncompared', 'short-deadline', 'pool-small' or 'misspelt'.
        what: The problem and its consequence.
        mend: The line, or the change, that mends it.
    """

    name: str
    what: str
    mend: str

    def __str__(self) -> str:
        """Return both sentences."""
        return f"{self.what} {self.mend}"


def warn(problem: SetupProblem) -> None:
    """Warn of *problem*, at the line of the user's that has called us."""
    frame, ours = sys._getframe(1), 1  # noqa: SLF001 - how many of the innermost are ours: compiled code has none
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("geventbatch."):
        frame, ours = frame.f_back, ours + 1
    warnings.warn(str(problem), RuntimeWarning, stacklevel=1 + ours)
