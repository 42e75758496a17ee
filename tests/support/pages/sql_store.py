"""For docs/sql-store.md: shows in a schema of their own; the last of the stores is used."""

from urllib.parse import quote
from uuid import uuid4

import psycopg

from geventbatch import Processor, current_batch
from tests.support.servers import administer, postgres_url

schema = f"page_{uuid4().hex}"
TABLES = """
    CREATE TABLE shows (id int PRIMARY KEY, title text, stock int); INSERT INTO shows VALUES (1, 'Faust', 10);
    CREATE TABLE tickets (show int, name text)
"""
administer(f"CREATE SCHEMA {schema}; SET LOCAL search_path = {schema}; {TABLES}")
url = postgres_url()
DATABASE_URL = f"{url}{'&' if '?' in url else '?'}options={quote(f'-c search_path={schema}')}"


def asked(query):
    with psycopg.connect(DATABASE_URL) as connection:
        return connection.execute(query).fetchall()


def check(page):
    assert page["left"] == 8
    page["shows"].stop()
    with Processor(open_resource=page["store"], min_duration=0) as shows:
        assert shows.run(1, page["sell_to"], "Ann", idempotency_key="a") == 7
        assert shows.run(2, dict.copy)["stock"] == 100
        shows.run(2, lambda _: current_batch().delete())
        shows.run_across([1, 3], lambda pair: [one.update(stock=5) for one in pair])
    assert asked("SELECT id, stock FROM shows ORDER BY id") == [(1, 5), (3, 5)]
    assert asked("SELECT * FROM tickets") == [(1, "Ann")]
    page["pool"].close()
    administer(f"DROP SCHEMA {schema} CASCADE")
