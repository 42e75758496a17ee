#!/usr/bin/env bash
# dramatiq 2.2.1, gevent 26.9.0: a message that is interrupted by the worker's shutdown has used up a try; with max_retries=0 it is lost.
#
# With notify_shutdown=True, Dramatiq raises Shutdown in an actor that runs when its worker is told to end. Retries counts that like an error of the
# actor: a message without a retry left becomes a dead letter at each deployment. With a retry left it is enqueued with a backoff: if that is short,
# the worker that is about to end takes the message again itself.
#
# Exits 0 while it is so. Takes ten seconds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet dramatiq==2.2.1 gevent==26.9.0
cat > "$folder/one.py" <<'PYTHON'
from gevent import monkey

monkey.patch_all()

import time

import dramatiq
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import Shutdown
from gevent.event import Event

broker = StubBroker()
dramatiq.set_broker(broker)
began, raised = Event(), []


@dramatiq.actor(max_retries=0, notify_shutdown=True)
def wait():
    began.set()
    try:
        time.sleep(30)
    except Shutdown as error:
        raised.append(error)
        raise


broker.emit_after("process_boot")
worker = dramatiq.Worker(broker, worker_timeout=100)
worker.start()
wait.send()
began.wait()
worker.stop()
print(f"interrupted by the shutdown: {len(raised)}; dead letters: {len(broker.dead_letters)}")
assert (len(raised), len(broker.dead_letters)) == (1, 1)
PYTHON
"$folder/venv/bin/python" "$folder/one.py" 2> /dev/null
