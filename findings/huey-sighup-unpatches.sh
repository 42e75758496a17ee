#!/usr/bin/env bash
# huey 3.5.4, gevent 26.9.0: a consumer that was patched by `python -m gevent.monkey huey_consumer …` is not patched any more after SIGHUP.
#
# At SIGHUP the consumer replaces its process: os.execl(sys.executable, sys.executable, *sys.argv). gevent.monkey has put the script it runs in the
# place of itself in sys.argv, so the new process runs huey_consumer by itself. For the same reason a consumer in `python -m package.module`
# starts anew as `python …/package/module.py`, without its package. A script that patches in its first lines stays patched.
#
# Exits 0 while it is so. Takes ten seconds.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill -9 "$pid" 2> /dev/null || true; rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet huey==3.5.4 gevent==26.9.0
cat > "$folder/jobs.py" <<'PYTHON'
from gevent import monkey
from huey import SqliteHuey

huey = SqliteHuey(filename="queue.sqlite")


@huey.on_startup()
def told():
    with open("told", "a") as file:
        file.write(f"{monkey.is_module_patched('socket')}\n")
PYTHON
cd "$folder"
venv/bin/python -m gevent.monkey venv/bin/huey_consumer jobs.huey --workers 1 --worker-type greenlet > log 2>&1 &
pid=$!
until [ -s told ]; do sleep 0.1; done
kill -HUP "$pid"
for _ in $(seq 1200); do [ "$(wc -l < told)" = 2 ] && break; sleep 0.1; done
echo "patched before and after SIGHUP: $(tr '\n' ' ' < told)"
[ "$(tr '\n' ' ' < told)" = "True False " ]
