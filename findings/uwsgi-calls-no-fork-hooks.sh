#!/usr/bin/env bash
# pyuwsgi 2.0.30.post1: functions of os.register_at_fork are not called when the master forks its workers.
#
# The master imports the application, and forks in C. Unless --py-call-osafterfork is given, Python hears nothing of it: what a
# library has registered with os.register_at_fork to close inherited connections, or to forget inherited work, does not run. A worker
# finds out only by os.getpid(). uwsgidecorators.postfork is called.
#
# Needs Python 3.11. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pyuwsgi==2.0.30.post1
cat > "$folder/app.py" <<'PYTHON'
import os

import uwsgidecorators

called = []
imported_by = os.getpid()
os.register_at_fork(after_in_child=lambda: called.append("os.register_at_fork"))


@uwsgidecorators.postfork
def after_fork():
    called.append("postfork")


def application(environ, start_response):
    start_response("200 OK", [])
    return [f"same process: {os.getpid() == imported_by}, called: {called}".encode()]
PYTHON
cat > "$folder/run.py" <<'PYTHON'
import signal
import socket
import subprocess
import time
import urllib.request

with socket.create_server(("127.0.0.1", 0)) as one:
    port = one.getsockname()[1]
found = {}
for options in ((), ("--py-call-osafterfork",)):
    server = subprocess.Popen(
        ["venv/bin/pyuwsgi", "--http-socket", f"127.0.0.1:{port}", "--master", "--processes", "1"]
        + ["--enable-threads", "--wsgi-file", "app.py", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    found[options] = answer.read().decode()
                break
            except OSError:
                time.sleep(0.05)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    print(" ".join(options) or "no options:", found.get(options))
assert found[()] == "same process: False, called: ['postfork']", found
assert "os.register_at_fork" in found["--py-call-osafterfork",], found
PYTHON
cd "$folder"
"$folder/venv/bin/python" run.py
