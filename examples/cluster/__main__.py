"""Sell tickets at http://127.0.0.1:8000, from several backends behind one nginx, or measure it.

python -m examples.cluster --backends 3    serve until interrupted; the signal TTIN adds a backend, TTOU takes one away
python -m examples.cluster --load 20       send HTTP load for 20 seconds, half of it not routed by train, and print what
                                           it came to

The trains are in the database that DATABASE_URL names, postgresql://… or redis://…, or else in a PostgreSQL of its own,
which is gone afterwards.
"""

import argparse
import errno
import os
import signal
import sys
from queue import Empty, SimpleQueue

from examples.cluster.backends import Cluster
from examples.cluster.database import database
from examples.cluster.nginx import free_port

ENDING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Do what the command line says."""
    chosen = _parser().parse_args()
    if chosen.load is None:
        _serve(chosen)
        return 0
    # Only here: a server has no use for it.
    from examples.cluster.compare import LOADS, ROUTINGS, compare

    rounds = 2
    seconds = chosen.load / (rounds * len(LOADS) * len(ROUTINGS))
    return 0 if compare([chosen.backends], rounds, seconds, chosen.clients) else 1


def _serve(chosen: argparse.Namespace) -> None:
    """Do what signals say; in between, start anew what has ended."""
    try:
        port = free_port(chosen.port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sys.exit(f"port {chosen.port} is taken: --port N, or 0 for any")
    told: SimpleQueue[int] = SimpleQueue()
    for number in (*ENDING, signal.SIGTTIN, signal.SIGTTOU):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: told.put(number))
    with database(os.environ.get("DATABASE_URL")) as url, Cluster(url, chosen.backends, port) as cluster:
        address = f"http://{cluster.nginx.host}:{cluster.nginx.port}/"
        print(f"Tickets are sold at {address} by {_named(cluster)} (Ctrl-C ends it)")
        print(f"kill -TTIN {os.getpid()} adds one, -TTOU takes one away; logs: {cluster.directory}/*.log", flush=True)
        while (number := _next(told)) not in ENDING:
            if number == signal.SIGTTIN:
                print(f"Backend {cluster.add()} is new", flush=True)
            elif number == signal.SIGTTOU and len(cluster.backends) > 1:
                name = list(cluster.backends)[-1]
                cluster.remove(name)
                print(f"Backend {name} is gone", flush=True)
            for name in cluster.mend():
                print(f"Backend {name} had ended and is back", flush=True)


def _next(told: SimpleQueue[int]) -> int:
    """The next signal, or 0 after a second without one."""
    try:
        return told.get(timeout=1)
    except Empty:
        return 0


def _named(cluster: Cluster) -> str:
    names = list(cluster.backends)
    return f"backends {names[0]} to {names[-1]}" if len(names) > 1 else f"backend {names[0]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--backends", type=int, default=2)
    parser.add_argument("--load", type=float, metavar="SECONDS", help="measure for that long")
    parser.add_argument("--clients", type=int, default=100, help="for --load")
    return parser


if __name__ == "__main__":
    sys.exit(main())
