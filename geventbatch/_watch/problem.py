"""A problem, and how its warning is given."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SetupProblem:
    """Something that makes batches slow, wrong after a fork, or lose what was answered.

    Attributes:
        name: For programs: 'unpatched', 'fork-unpatched', 'forked-late', 'forked-connections', 'psycopg', 'psycopg2',
            'mysqlclient' or 'mysql-connector'; of a processor 'unsaved', 'uncompared', 'short-deadline' or
            'misspelt'.
        what: What is wrong, and what comes of it.
        mend: The line, or the change, that mends it.
    """

    name: str
    what: str
    mend: str

    def __str__(self) -> str:
        """Give both sentences."""
        return f"{self.what} {self.mend}"


def warn(problem: SetupProblem) -> None:
    """Warn of *problem*, where users have called us."""
    frame, ours = sys._getframe(1), 1  # noqa: SLF001 - how many of the innermost are ours: compiled code has none
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("geventbatch."):
        frame, ours = frame.f_back, ours + 1
    warnings.warn(str(problem), RuntimeWarning, stacklevel=1 + ours)
