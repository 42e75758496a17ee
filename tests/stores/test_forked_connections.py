"""No connection that the parent has opened is used in a child, forked by Python or in C (guarantee 12)."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
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


def run(form: str, address: str, way: str = "by Python") -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.programs.forked_connections", form, address, way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return sorted(ran.stdout.splitlines())


FORKS = pytest.mark.parametrize("way", ["by Python", "in C"])


@pytest.fixture(params=["postgresql", "sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    server: Any = request.param
    with fresh(server, tmp_path) as address:
        found = PLACES[server](address)
        made: sa.URL = getattr(found, "url", sa.make_url(address.partition("#")[0]))
        if server == "postgresql":
            made = made.update_query_dict({"options": f"-c search_path={address.partition('#')[2]}"})
        yield made.render_as_string(hide_password=False)


@FORKS
def test_an_engine_that_was_used_before_the_fork_works_in_the_children_and_in_the_parent(url: str, way: str) -> None:
    assert run("sqlalchemy", url, way) == ["['forked-connections'] True"] * 2 + ["parent []"]


@FORKS
def test_what_a_child_has_opened_by_itself_is_not_taken_for_its_parents(url: str, way: str) -> None:
    assert run("sqlalchemy_unused", url, way) == ["[] True"] * 2 + ["parent []"]


@FORKS
@pytest.mark.parametrize("server", ["postgresql", "sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def test_a_connection_of_djangos_that_was_used_before_the_fork_is_left_to_the_parent(
    server: str, tmp_path: Path, way: str
) -> None:
    with place(server, tmp_path) as address:
        assert run("django", address, way) == ["['forked-connections'] True"] * 2 + ["parent []"]


@contextmanager
def emptied(url: str) -> Iterator[str]:
    """Yield the address *url*, and delete what the program has saved there."""
    try:
        yield url
    finally:
        with connected(url) as client:
            for key in ("child 1", "child 2", "of the parent"):
                client.delete(key)


@FORKS
def test_a_client_of_redis_that_was_used_before_the_fork_works_in_the_children_and_in_the_parent(way: str) -> None:
    with emptied(redis_url()) as address:
        assert run("redis", address, way) == ["[] True"] * 2 + ["parent []"]


@FORKS
def test_so_does_a_client_of_a_cluster_with_a_store_that_keeps_what_it_saves(way: str) -> None:
    with emptied(cluster_url()) as address:
        assert run("redis_cluster", address, way) == ["['forked-late'] True"] * 2 + ["parent []"]


@pytest.fixture
def postgresql(tmp_path: Path) -> Iterator[str]:
    with fresh("postgresql", tmp_path) as address:
        place: Any = PLACES["postgresql"](address)
        made = place.url.update_query_dict({"options": f"-c search_path={place.schema}"})
        yield made.render_as_string(hide_password=False)


@FORKS
@pytest.mark.parametrize("form", ["sql", "sql_closed"])
def test_a_pool_that_is_empty_or_closed_at_the_fork_works_in_the_children_and_in_the_parent(
    postgresql: str, form: str, way: str
) -> None:
    assert run(form, postgresql, way) == ["[] True"] * 2 + ["parent []"]


@FORKS
def test_a_pool_with_connections_at_the_fork_is_refused_by_name_in_the_children(postgresql: str, way: str) -> None:
    *children, parent = run("sql_used", postgresql, way)
    assert parent == "parent []"
    assert len(children) == 2
    for told in children:
        assert told.startswith("['forked-pool'] <psycopg2.pool.ThreadedConnectionPool")
        assert "ThreadedConnectionPool(0, n, …), then pool.minconn = n" in told
