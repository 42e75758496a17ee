"""Open the wallet on a free port, or measure it.

python -m examples.wallet              serve until interrupted, from wallet.sqlite or what DATABASE_URL names
python -m examples.wallet --load 10    send HTTP load for 10 seconds, and print what it came to
"""

import argparse
import os
import sys
from pathlib import Path

from examples.server import command

CONFIGURATION = Path(__file__).with_name("gunicorn.conf.py")


def main() -> int:
    """Do what the command line says."""
    chosen = _parser().parse_args()
    os.environ["BATCHING"] = chosen.batching
    if chosen.load is None:
        _serve(chosen)
    # Only here: a server has no use for it.
    from examples.wallet.load_table import print_table

    agrees = print_table(chosen.load, chosen.clients, chosen.workers, os.environ.get("DATABASE_URL"))
    return 0 if agrees else 1


def _serve(chosen: argparse.Namespace) -> None:
    """Become gunicorn: signals reach it without a detour."""
    migrate()
    arguments = ("--bind", f"{chosen.bind}:{chosen.port}", "--workers", str(chosen.workers))
    os.execv(sys.executable, command(CONFIGURATION, *arguments))


def migrate() -> None:
    """Make the tables, in the database that DATABASE_URL names."""
    import django
    from django.core.management import call_command
    from django.db import connections

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.wallet.settings")
    django.setup()
    call_command("migrate", verbosity=0)
    connections.close_all()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.wallet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--workers", type=int, default=_workers(), help="by default 2, on SQLite 1")
    parser.add_argument("--batching", choices=("on", "off"), default=os.environ.get("BATCHING", "on"))
    parser.add_argument(
        "--load", type=float, metavar="SECONDS", help="measure for that long, half of it without batching"
    )
    parser.add_argument("--clients", type=int, default=100, help="for --load")
    return parser


def _workers() -> int:
    """SQLite has no row lock to queue on: two workers that change the same accounts would mostly replay."""
    return 2 if os.environ.get("DATABASE_URL", "sqlite:").startswith("postgres") else 1


if __name__ == "__main__":
    sys.exit(main())
