"""What the views of the tutorial reach, as they were and batched: real HTTP, one account, a PostgreSQL of its own.

    python -m examples.tutorial [--seconds 4] [--clients 100]

Each figure is over all turns. The balance in the database is compared with what the clients were told.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gevent import monkey

monkey.patch_all()

import gevent
import sqlalchemy as sa

from examples.client import Connection
from examples.cluster.database import database
from examples.server import Server

CONFIGURATION = Path(__file__).with_name("gunicorn.conf.py")
VIEWS = {
    "Flask, plain": "examples.tutorial.flask_plain:app",
    "Flask, batched": "examples.tutorial.flask_batched:app",
    "Django, plain": "examples.tutorial.django_plain",
    "Django, batched": "examples.tutorial.django_batched",
}
TURNS = 2
FUNDS = 10**9


class Reached:
    """What the clients of one view were told."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.seconds = 0.0

    def turn(self, server: Server, seconds: float, clients: int) -> None:
        """Have each client ask again as soon as it is answered."""
        begun = time.perf_counter()
        until = begun + seconds
        gevent.joinall([gevent.spawn(self._client, server, until) for _ in range(clients)], raise_error=True)
        self.seconds += time.perf_counter() - begun

    def _client(self, server: Server, until: float) -> None:
        connection = Connection(server.host, server.port)
        while (asked := time.perf_counter()) < until:
            status, _ = connection.ask("POST", "/accounts/1/withdrawals", {"amount": 1})
            self.latencies.append(time.perf_counter() - asked)
            self.statuses[status] += 1
        connection.close()

    def __str__(self) -> str:
        ordered = sorted(self.latencies)
        p50, p99 = (ordered[len(ordered) * percent // 100] * 1000 for percent in (50, 99))
        return f"{len(ordered) / self.seconds:>12,.0f}{p50:>11.1f}{p99:>11.1f}"


def compare(seconds: float, clients: int) -> bool:
    """Print the table; True when the database holds what the clients were told."""
    rows = {name: Reached() for name in VIEWS}
    with database(None) as uri, ExitStack() as servers:
        url = uri.replace("postgresql://", "postgresql+psycopg://")
        with _account(url) as balance:
            running = {name: servers.enter_context(_server(url, view)) for name, view in VIEWS.items()}
            for _ in range(TURNS):
                for name, row in rows.items():
                    row.turn(running[name], seconds / TURNS, clients)
            left = balance()
    print(f"{clients} client{'s' * (clients > 1)} in a closed loop on one account, ", end="")
    print(f"PostgreSQL, one gunicorn worker; {seconds:g} s each.\n")
    print(f"{'':<18}{'requests/s':>12}{'p50 ms':>11}{'p99 ms':>11}")
    for name, row in rows.items():
        print(f"{name:<18}{row}")
    statuses = sum((row.statuses for row in rows.values()), Counter[int]())
    right = left == FUNDS - statuses[200] and set(statuses) == {200}
    print("\nChecked: the balance is what the clients were told." if right else f"\nWRONG: {left} is left, {statuses}")
    return right


def _server(url: str, view: str) -> Server:
    django = ":" not in view
    application = "django.core.wsgi:get_wsgi_application()" if django else view
    environment = {"DATABASE_URL": url, "ROOT_URLCONF": view, "DJANGO_SETTINGS_MODULE": "examples.tutorial.settings"}
    return Server(CONFIGURATION, environment, [application])


@contextmanager
def _account(url: str) -> Iterator[Callable[[], int]]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE bank_account (number integer PRIMARY KEY, balance integer NOT NULL)"))
        connection.execute(sa.text("INSERT INTO bank_account VALUES (1, :funds)"), {"funds": FUNDS})

    def balance() -> int:
        with engine.begin() as connection:
            return int(connection.execute(sa.text("SELECT balance FROM bank_account")).scalar_one())

    yield balance
    engine.dispose()


def main() -> None:
    """Run the load that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m examples.tutorial")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=100)
    chosen = parser.parse_args()
    sys.exit(not compare(chosen.seconds, chosen.clients))


if __name__ == "__main__":
    main()
