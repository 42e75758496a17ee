#!/usr/bin/env bash
# prometheus_client 0.26.0, gunicorn 27.0.1: the child_exit hook of the client's own documentation ends the whole server at the first worker
# that exits, if PROMETHEUS_MULTIPROC_DIR is not set.
#
# multiprocess.mark_process_dead(pid) takes the folder from the variable and, where there is none, raises TypeError (it joins None). gunicorn
# calls child_exit in its parent, in the loop that replaces workers, and does not catch what a hook raises: the parent ends with status
# 255. Nothing is said when the server starts: a deployment that lacks the variable serves until the first of its workers is replaced.
#
# The worker here is told to end in order, as max_requests would tell it. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill -9 "$pid" 2> /dev/null || true; rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet prometheus_client==0.26.0 gunicorn==27.0.1
cat > "$folder/gunicorn.conf.py" <<'PYTHON'
from prometheus_client import multiprocess

bind = "127.0.0.1:0"
workers = 1
wsgi_app = "app:application"


def post_worker_init(worker):
    with open("worker", "w") as file:
        file.write(str(worker.pid))


def child_exit(server, worker):
    multiprocess.mark_process_dead(worker.pid)
PYTHON
cat > "$folder/app.py" <<'PYTHON'
def application(environ, start_response):
    start_response("200 OK", [])
    return [b""]
PYTHON
cd "$folder"
unset PROMETHEUS_MULTIPROC_DIR prometheus_multiproc_dir
venv/bin/python -m gunicorn 2> log &
pid=$!
for _ in $(seq 600); do [ -s worker ] && break; sleep 0.1; done
kill -TERM "$(cat worker)"
status=0
wait "$pid" || status=$?
grep -o "TypeError: .*" log | head -1
echo "gunicorn's parent ended with $status"
[ "$status" = 255 ]
grep -q "TypeError: " log
