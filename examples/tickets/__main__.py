"""Sell tickets at http://127.0.0.1:8000, or measure it.

python -m examples.tickets              serve until interrupted
python -m examples.tickets --load 10    send HTTP load for 10 seconds, and print what it came to
"""

import argparse
import os
import sys

from examples.server import command
from examples.tickets.settings import CONFIGURATION


def main() -> int:
    """Do what the command line says."""
    chosen = _parser().parse_args()
    if chosen.load is None:
        _serve(chosen)
    # Only here: a server has no use for it.
    from examples.tickets.compare import compare

    agrees = compare(chosen.load, chosen.clients, chosen.workers, os.environ.get("DATABASE_URL"))
    return 0 if agrees else 1


def _serve(chosen: argparse.Namespace) -> None:
    """Become gunicorn: signals reach it without a detour."""
    os.environ["BATCHING"] = chosen.batching
    arguments = ("--bind", f"{chosen.bind}:{chosen.port}", "--workers", str(chosen.workers))
    os.execv(sys.executable, command(CONFIGURATION, *arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tickets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batching", choices=("on", "off"), default=os.environ.get("BATCHING", "on"))
    parser.add_argument(
        "--load", type=float, metavar="SECONDS", help="measure for that long, half of it without batching"
    )
    parser.add_argument("--clients", type=int, default=100, help="for --load")
    return parser


if __name__ == "__main__":
    sys.exit(main())
