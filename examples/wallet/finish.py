"""Finish pending transfers, as long as there are any.

python -m examples.wallet.finish            until it is told to end, or what has started it has ended
python -m examples.wallet.finish --once     what is pending now
"""

import argparse
import os
import signal
import sys

import gevent
from gevent import monkey
from gevent.event import Event

# Seconds until it looks again, when there was nothing to finish.
PAUSE = 0.2
MOST_IN_VAIN = 10


def main() -> int:
    """Do what the command line says; 1 when something is left."""
    parser = argparse.ArgumentParser(prog="python -m examples.wallet.finish", description=__doc__)
    parser.add_argument("--once", action="store_true", help="finish what is pending now, and end")
    chosen = parser.parse_args()
    ending = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, ending.set)
    return _once() if chosen.once else _until(ending)


def _once() -> int:
    from examples.wallet.models import Pending
    from examples.wallet.outbox import finish

    in_vain = 0
    while Pending.objects.exists() and in_vain < MOST_IN_VAIN:
        if finish():
            in_vain = 0
        else:  # another process may be finishing the same
            in_vain += 1
            gevent.sleep(PAUSE)
    return 1 if Pending.objects.exists() else 0


def _until(ending: Event) -> int:
    from django.db import Error, close_old_connections

    from examples.wallet.outbox import finish

    parent = os.getppid()
    while not ending.is_set() and os.getppid() == parent:
        close_old_connections()
        try:
            finished = finish()
        except Error as error:  # the database will be there again
            print(f"finish: {error}", file=sys.stderr)
            finished = 0
        if not finished:
            ending.wait(PAUSE)
    return 0


if __name__ == "__main__":
    monkey.patch_all()
    import django

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.wallet.settings")
    django.setup()
    sys.exit(main())
