"""The wallet as its users run it: real servers, many clients, and an audit that knows nothing of the application.

Its own tests, in Django's `TestCase`, are in examples/wallet/tests.py.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest
import sqlalchemy as sa

from examples.client import Connection
from examples.server import ROOT, Server
from examples.wallet.load import FUNDS, Client, Report, open_accounts, run
from tests.support.logs import unexpected
from tests.support.servers import database, side_by_side

CONFIGURATION = ROOT / "examples" / "wallet" / "gunicorn.conf.py"
# Django's tests in this process have settings of their own.
SETTINGS = {"DJANGO_SETTINGS_MODULE": "examples.wallet.settings"}
CLIENTS = 200
ACCOUNTS = 20
NOBODYS = 10**6


def on_each_database(run: Callable[[str, Path], None], directory: Path) -> None:
    """Run it on both at once, with a directory for each."""
    kinds = [("sqlite", directory / "sqlite"), ("postgresql", directory / "postgresql")]
    for _, own in kinds:
        own.mkdir()
    side_by_side(run, *kinds)


class Line(NamedTuple):
    """One line of the audit, as it is saved."""

    reference: str
    kind: str
    amount: int
    source: int | None
    source_balance: int | None
    target: int | None
    target_balance: int | None


class Books:
    """What is in the database, read without the application."""

    def __init__(self, url: str) -> None:
        engine = sa.create_engine(sa.make_url(url).set(drivername=None or _driver(url)))
        with engine.connect() as connection:
            self.balances: dict[int, int] = {
                row[0]: row[1] for row in connection.execute(sa.text("SELECT id, balance FROM wallet_account"))
            }
            self.pending = [
                (str(UUID(str(row[0]))), row[1])
                for row in connection.execute(sa.text("SELECT reference, amount FROM wallet_pending"))
            ]
            self.lines = [
                Line(str(UUID(str(row[0]))), *row[1:])
                for row in connection.execute(
                    sa.text(
                        "SELECT reference, kind, amount, source_id, source_balance, target_id, target_balance "
                        "FROM wallet_movement ORDER BY id"
                    )
                )
            ]
        engine.dispose()

    def underway(self) -> int:
        """How much was taken and has not arrived; what is pending may have arrived already."""
        credited = {line.reference for line in self.lines if line.kind == "credit"}
        return sum(amount for reference, amount in self.pending if reference not in credited)

    def deposited(self) -> int:
        return sum(line.amount for line in self.lines if line.kind == "deposit")


def check(books: Books, report: Report) -> None:
    """Money is conserved, the audit agrees with the balances, and both with what each client was told."""
    assert min(books.balances.values()) >= 0
    assert sum(books.balances.values()) + books.underway() == books.deposited()
    assert _replayed(books.lines) == books.balances
    saved = {(line.reference, line.kind): line for line in books.lines}
    assert len(saved) == len(books.lines)
    for asked in report.asked:
        line = saved.pop((asked.reference, asked.kind), None)
        if asked.outcome != "unknown":
            assert (line is not None) is (asked.outcome == "saved"), asked
        if line is not None:
            assert (line.amount, line.source) == (asked.amount, asked.source)
            assert line.target == (None if asked.kind == "debit" else asked.target)
            credit = saved.pop((asked.reference, "credit"), None)
            if credit is not None:
                assert (credit.amount, credit.target) == (asked.amount, asked.target)
    # What the accounts began with is left, and nothing else that nobody has asked for.
    assert [(line.kind, line.amount) for line in saved.values()] == [("deposit", FUNDS)] * ACCOUNTS


def _replayed(lines: list[Line]) -> dict[int, int]:
    """The balances that the audit comes to; each line has to say so too."""
    balances: dict[int, int] = Counter()
    for line in lines:
        if line.source is not None:
            balances[line.source] -= line.amount
            assert balances[line.source] == line.source_balance, line
        if line.target is not None:
            balances[line.target] += line.amount
            assert balances[line.target] == line.target_balance, line
    return balances


def test_200_clients_at_once_and_an_end_in_their_middle_lose_no_money_and_nothing_that_was_answered(
    tmp_path: Path,
) -> None:
    on_each_database(_end_in_the_middle, tmp_path)


def _end_in_the_middle(kind: str, directory: Path) -> None:
    with database(kind, directory) as url, wallet(url, directory, "--workers", "2", "--preload") as server:

        def is_over(told: Report) -> bool:
            all_kinds = min(told.statuses[status] for status in ("201", "202", "404", "409")) > CLIENTS / 10
            if all_kinds and len(told.asked) > 3 * CLIENTS and server.process.poll() is None:
                server.process.terminate()
            return told.statuses["None"] > 0

        report = crowd(server, is_over, "transfer", "transfer", "deposit", "debit")

        assert server.wait() == 0
        logged = log(directory)
        assert unexpected(logged) == []
        check(Books(url), report)
        assert report.statuses.keys() <= {"201", "202", "404", "409", "500", "503", "504", "None"}
        # None but those whose outcome is unknown: a busy machine may have had no time for the answer to a COMMIT.
        unknown = re.findall("geventbatch.django .*; it is unknown whether anything was saved", logged)
        assert report.statuses["500"] == len(unknown)
        finish(url)
        check(Books(url), report)


def test_pending_transfers_are_finished_after_everything_was_killed_in_their_middle(tmp_path: Path) -> None:
    on_each_database(_kill_in_the_middle, tmp_path)


def _kill_in_the_middle(kind: str, directory: Path) -> None:
    # What was pending when it was looked at may be finished before the signal comes; then it is tried again.
    attempts = [directory / str(attempt) for attempt in range(5)]
    assert any(_kill_once(kind, attempt) for attempt in attempts), "the kill never came in the middle of anything"


def _kill_once(kind: str, directory: Path) -> bool:
    """Say whether something was pending."""
    directory.mkdir()
    with database(kind, directory) as url, wallet(url, directory, "--workers", "1") as server:

        def is_over(told: Report) -> bool:
            in_the_middle = told.statuses["202"] > CLIENTS and told.statuses["202"] % 20 == 0
            if in_the_middle and server.process.poll() is None and Books(url).pending:
                server.kill()
            return told.statuses["None"] > 0

        report = crowd(server, is_over, "debit")

        left = Books(url)
        pending = bool(left.pending)
        check(left, report)
        finish(url)
        check(Books(url), report)
        return pending


def test_its_own_tests_pass(tmp_path: Path) -> None:
    on_each_database(_test, tmp_path)


def _test(kind: str, directory: Path) -> None:
    with database(kind, directory) as url:
        told = python("-W", "error", "-m", "django", "test", "examples.wallet", DATABASE_URL=url)
        assert "no issues (0 silenced)" in told
        assert "\nOK\n" in told
        assert "Ran 18 tests" in told


def test_the_migrations_are_those_of_the_models(tmp_path: Path) -> None:
    with database("sqlite", tmp_path) as url:
        python("-m", "django", "makemigrations", "--check", DATABASE_URL=url)


def finish(url: str) -> None:
    """Finish pending transfers, in two processes at once: each credit is saved once."""
    side_by_side(lambda: python("-m", "examples.wallet.finish", "--once", DATABASE_URL=url), (), ())
    assert not Books(url).pending


@pytest.mark.variants
@pytest.mark.timeout(180)
def test_both_tables_are_printed_and_agree_with_the_database(tmp_path: Path) -> None:
    side_by_side(lambda measure: measure(tmp_path), (_compare_ways,), (_compare_batching,))


def _compare_ways(directory: Path) -> None:
    with database("postgresql", directory) as url:
        few = ("--rounds", "1", "--seconds", "0.1", "--clients", "5", "--accounts", "5", "--ways", "outbox")
        table = python("-m", "examples.wallet.compare", *few, DATABASE_URL=url)
    rows = re.findall(r"^  outbox +([\d,]+) .* ([\d.]+) +([\d.]+)$", table, re.MULTILINE)
    assert len(rows) == 2, table
    for transfers, statements, round_trips in rows:
        assert int(transfers.replace(",", "")) > 0
        # At the least a load, a save of three and a save of two, for all clients together.
        assert float(statements) > 1
        assert float(round_trips) > 0.4


def _compare_batching(directory: Path) -> None:
    with database("sqlite", directory) as url:
        table = python("-m", "examples.wallet", "--load", "0.4", "--clients", "5", DATABASE_URL=url)
    assert re.search(r"^batching +\d", table, re.MULTILINE)
    assert "Checked: money is conserved, and the audit agrees with all balances and answers." in table


@contextmanager
def wallet(url: str, directory: Path, *arguments: str) -> Iterator[Server]:
    """Run gunicorn with the wallet until the block is left."""
    python("-m", "django", "migrate", DATABASE_URL=url)
    try:
        with Server(CONFIGURATION, {**SETTINGS, "DATABASE_URL": url}, arguments, directory / "gunicorn.log") as server:
            yield server
    except BaseException as error:
        error.add_note(log(directory))
        raise


def crowd(server: Server, is_over: Callable[[Report], bool], *kinds: str) -> Report:
    """What so many clients were told, who have worked on new accounts, and on one that is not there."""
    report = Report()
    accounts = [*open_accounts(server.host, server.port, ACCOUNTS), NOBODYS]
    connections = (Connection(server.host, server.port) for _ in range(CLIENTS))
    run([Client(connection, accounts, kinds, report) for connection in connections], is_over)
    return report


def log(directory: Path) -> str:
    return (directory / "gunicorn.log").read_text()


def python(*arguments: str, **environment: str) -> str:
    """What it prints."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=50,
        check=False,
    )
    told = ended.stdout.decode()
    assert ended.returncode == 0, told
    return told


def _driver(url: str) -> str:
    return "sqlite" if url.startswith("sqlite") else "postgresql+psycopg"
