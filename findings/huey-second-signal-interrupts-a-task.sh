#!/usr/bin/env bash
# huey 3.5.4, gevent 26.9.0, greenlet workers: a second SIGINT does not interrupt the shutdown, but whatever task is computing, which is lost.
#
# At the first SIGINT the consumer ends in order: it waits for its tasks. With the same signal it gives the second one to Python's default
# handler, to interrupt that waiting. Python runs the handler in the main thread. Worker threads are not in it, but all greenlets are: the
# KeyboardInterrupt is raised in the one that happens to run. In the middle of a task `except Exception` does not catch it, the task
# does not finish, and the consumer goes on waiting for the others.
#
# Two tasks run, one computes and one sleeps. Exits 0 while the first is interrupted and the second one is waited for. Takes ten seconds.
set -euo pipefail
folder=$(mktemp -d)
pid=
trap 'kill -9 $pid 2> /dev/null || true; rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet huey==3.5.4 gevent==26.9.0
cat > "$folder/consumer.py" <<'PYTHON'
from gevent import monkey

monkey.patch_all()

import signal

for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
    signal.signal(number, signal.SIG_DFL)

import os
import time

from huey import SqliteHuey

huey = SqliteHuey(filename="queue.sqlite")


def noted(name, work):
    open(f"{name}.begun", "w").close()
    end = "done"
    try:
        work()
    except BaseException as error:
        end = type(error).__name__
        raise
    finally:
        with open(f"{name}.ended", "w") as file:
            file.write(end)


def calculate():
    until = time.monotonic() + 4
    while time.monotonic() < until:
        sum(range(1000))


@huey.task()
def sleeping():
    noted("sleeping", lambda: time.sleep(8))


@huey.task()
def computing():
    while not os.path.exists("sleeping.begun"):
        time.sleep(0.1)
    noted("computing", calculate)


sleeping()
computing()
huey.create_consumer(workers=2, worker_type="greenlet", periodic=False).run()
PYTHON
cd "$folder"
venv/bin/python consumer.py > log 2>&1 &
pid=$!
until [ -e computing.begun ]; do sleep 0.1; done
sleep 0.5
kill -INT "$pid"
sleep 1
kill -INT "$pid"
for _ in $(seq 600); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
for task in computing sleeping; do echo "$task: $(cat $task.ended 2> /dev/null || echo cut off)"; done
tail -n 1 log
[ "$(cat computing.ended) $(cat sleeping.ended)" = "KeyboardInterrupt done" ]
