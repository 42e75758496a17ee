#!/usr/bin/env bash
# gevent 26.9.0: WSGIServer.stop(timeout=20) in a handler of SIGTERM lets requests go on for one second only.
#
# serve_forever() waits for the event that stop() sets first, wakes, and calls stop() itself, with the server's own stop_timeout: one second.
# That kills the requests that the first stop() still waits for, and their clients get an error 500. server.close in the handler together with
# serve_forever(stop_timeout=20) lets them end.
#
# Needs Python 3.11. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet gevent==26.9.0
cat > "$folder/serve.py" <<'PYTHON'
from gevent import monkey

monkey.patch_all()

import signal
import sys

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import WSGIServer

began, all_began = [], Event()


def application(environ, start_response):
    began.append(environ)
    if len(began) == 10:
        print("under way", flush=True)
        all_began.set()
    all_began.wait()
    gevent.sleep(5)
    start_response("200 OK", [])
    return [b"done"]


server = WSGIServer(("127.0.0.1", 0), application, spawn=Pool(100), log=None, error_log=None)
server.start()
print(server.server_port, flush=True)
if sys.argv[1] == "stop":
    gevent.signal_handler(signal.SIGTERM, server.stop, timeout=20)
    server.serve_forever()
else:
    gevent.signal_handler(signal.SIGTERM, server.close)
    server.serve_forever(stop_timeout=20)
PYTHON
cat > "$folder/run.py" <<'PYTHON'
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

found = {}
for way in ("stop", "close"):
    server = subprocess.Popen([sys.executable, "serve.py", way], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    port = int(server.stdout.readline())
    answers = []

    def ask():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                answers.append(answer.status)
        except urllib.error.HTTPError as error:
            answers.append(error.code)
        except OSError as error:
            answers.append(type(error).__name__)

    clients = [threading.Thread(target=ask) for _ in range(10)]
    for client in clients:
        client.start()
    server.stdout.readline()  # all are under way
    server.send_signal(signal.SIGTERM)
    for client in clients:
        client.join()
    server.wait()
    found[way] = answers
    print(f"SIGTERM leads to server.{way}: {answers}")
assert found["close"] == [200] * 10, found
assert 200 not in found["stop"], found
PYTHON
cd "$folder"
"$folder/venv/bin/python" run.py
