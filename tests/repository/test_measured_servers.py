"""The server that measurements are made on keeps what it has committed, as a user's does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import psycopg
from tests.support.servers import end_postgres, postgres_url
with psycopg.connect(postgres_url()) as connection:
    print(*[connection.execute(f"SHOW {name}").fetchone()[0] for name in ("fsync", "full_page_writes")])
end_postgres()
"""


def test_outside_of_the_tests_postgresql_forces_to_the_disk_what_it_commits() -> None:
    others = {"PYTEST_VERSION", "GEVENTBATCH_TEST_POSTGRES_URL", "GEVENTBATCH_TESTS_SHARED"}
    environment = {name: value for name, value in os.environ.items() if name not in others}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert ran.stdout.split() == ["on", "on"]
