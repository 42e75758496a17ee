"""No connection that the parent has opened is used in a child that Python has forked (guarantee 12)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.django_project.start import place
from tests.support.redis_server import cluster_url, connected, redis_url

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


def run(form: str, address: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.programs.forked_connections", form, address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return sorted(ran.stdout.splitlines())


@pytest.fixture(params=["postgresql", "sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    server: Any = request.param
    with fresh(server, tmp_path) as address:
        found = PLACES[server](address)
        made: sa.URL = getattr(found, "url", sa.make_url(address.partition("#")[0]))
        if server == "postgresql":
            made = made.update_query_dict({"options": f"-c search_path={address.partition('#')[2]}"})
        yield made.render_as_string(hide_password=False)


def test_an_engine_that_was_used_before_the_fork_works_in_the_children_and_in_the_parent(url: str) -> None:
    assert run("sqlalchemy", url) == ["['forked-connections'] True"] * 2 + ["parent []"]


@pytest.mark.parametrize("server", ["postgresql", "sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def test_a_connection_of_djangos_that_was_used_before_the_fork_is_left_to_the_parent(
    server: str, tmp_path: Path
) -> None:
    with place(server, tmp_path) as address:
        assert run("django", address) == ["['forked-connections'] True"] * 2 + ["parent []"]


def test_a_client_of_redis_that_was_used_before_the_fork_works_in_the_children_and_in_the_parent() -> None:
    assert run("redis", redis_url()) == ["[] True"] * 2 + ["parent []"]


def test_so_does_a_client_of_a_cluster_with_a_store_that_keeps_what_it_saves() -> None:
    try:
        assert run("redis_cluster", cluster_url()) == ["['forked-late'] True"] * 2 + ["parent []"]
    finally:
        with connected(cluster_url()) as client:
            client.delete("child 1")
            client.delete("child 2")
            client.delete("of the parent")
