"""A child of a fork is left to other greenlets before `os.fork` has returned there: says who saved batches.

    python -m tests.support.programs.fork_that_switches

A provider of OpenTelemetry's SDK does it to whoever starts a process: it waits for threads there.
"""

from gevent import monkey

monkey.patch_all()

import os
import sys
import tempfile
import time

# Under gevent it lets all others run.
os.register_at_fork(after_in_child=lambda: time.sleep(0.01))

import gevent

from geventbatch import Processor
from tests.support.children import wait_for

if __name__ == "__main__":
    with tempfile.TemporaryFile() as saved:

        def load(_: object) -> list[int]:
            gevent.sleep(0)
            return []

        def save(_key: object, _resource: list[int]) -> None:
            os.write(saved.fileno(), b"parent\n" if os.getpid() == PARENT else b"child\n")
            gevent.sleep(0)

        def call(key: int) -> None:
            while True:
                processor.run(key, list.append, 1)
                os.write(saved.fileno(), b"parent\n" if os.getpid() == PARENT else b"child\n")

        PARENT = os.getpid()
        processor = Processor(load_resource=load, save_resource=save, max_duration=60)
        callers = [gevent.spawn(call, key) for key in range(5)]
        gevent.sleep(0)  # now all of them are in `run`; one that was not might call it in the child, as it may
        for _ in range(10):
            gevent.sleep(0)
            pid = os.fork()
            if not pid:
                os._exit(0)
            wait_for(pid)
        gevent.killall(callers)
        saved.seek(0)
        sys.stdout.write(" ".join(sorted({line.decode().strip() for line in saved})) + "\n")
