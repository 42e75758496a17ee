import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest
import sqlalchemy as sa
from gevent.event import Event

from examples.server import Server
from examples.table import Row, show
from examples.tickets.compare import MEANING, differences
from examples.tickets.domain import BadName, NotTheHolder, SeatTaken, Ticket, Train, UnknownSeat
from examples.tickets.load import Report
from examples.tickets.settings import TRAINS, Settings
from examples.tickets.storage import CONNECTIONS, SeatMap, Store
from examples.tickets.web import create_app
from geventbatch import BatchTimeout, LoadFailed, NotSaved, Processor, SaveFailed
from geventbatch.testing import check_operations, faults
from tests.support.servers import ask, database, seats_in, store, tickets, wait_until, waiting_for_a_lock

ONE = "Mountain Line"


# The domain.


def test_a_free_seat_goes_to_who_books_it() -> None:
    train = Train.empty(ONE, 30)

    assert train.book(30, " Ann ") == Ticket(ONE, 30, "Ann")
    assert train.holder(30) == "Ann"
    assert train.changes == 1


def test_a_cancelled_seat_is_free_again() -> None:
    train = Train.empty(ONE, 30)
    train.book(1, "Ann")

    train.cancel(1, "Ann")

    assert train.book(1, "Bob").passenger == "Bob"


@pytest.mark.parametrize(
    ("operation", "seat", "passenger", "error"),
    [
        (Train.book, 1, "Bob", SeatTaken),
        (Train.book, 0, "Bob", UnknownSeat),
        (Train.book, 31, "Bob", UnknownSeat),
        (Train.book, 2, "  ", BadName),
        (Train.book, 2, "B" * 81, BadName),
        (Train.book, 2, "B\nob", BadName),
        (Train.cancel, 1, "Bob", NotTheHolder),
        (Train.cancel, 2, "Bob", NotTheHolder),
        (Train.cancel, 31, "Bob", UnknownSeat),
    ],
)
def test_what_is_refused_leaves_the_train_as_it_was(
    operation: Any, seat: int, passenger: str, error: type[Exception]
) -> None:
    train = Train.empty(ONE, 30)
    train.book(1, "Ann")

    with pytest.raises(error):
        operation(train, seat, passenger)

    assert train == Train(ONE, ["Ann", *[None] * 29], changes=1)


# Storage, on both databases.


@pytest.fixture(params=["sqlite", "postgresql"], scope="module")
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with database(request.param, tmp_path_factory.mktemp("storage")) as url:
        yield url


@pytest.fixture
def trains(url: str) -> Iterator[Store]:
    with store(url, {}) as opened:
        with opened._engine.begin() as connection:
            connection.execute(sa.delete(opened.open_train.table))
        opened.create({ONE: 30})
        yield opened


@pytest.fixture
def processor(trains: Store) -> Iterator[Processor[Train]]:
    with (
        Processor(open_resource=trains.open_train, min_duration=0, max_duration=30) as processor,
        check_operations(processor),
    ):
        yield processor


def test_what_was_answered_is_saved_and_each_save_counts(trains: Store, processor: Processor[Train]) -> None:
    processor.run(ONE, Train.book, 7, "Ann")
    processor.run(ONE, Train.cancel, 7, "Ann")
    processor.run(ONE, Train.book, 8, "Bob")

    found = trains.seat_map(ONE)
    assert (seats_in(trains, ONE), found.train.changes, found.saves) == ({8: "Bob"}, 3, 3)


def test_a_batch_of_refused_bookings_saves_nothing(trains: Store, processor: Processor[Train]) -> None:
    with pytest.raises(UnknownSeat):
        processor.run(ONE, Train.book, 31, "Ann")

    assert trains.seat_map(ONE).saves == 0
    assert _connections_in_use(trains) == 0


def test_creating_again_changes_no_train(trains: Store, processor: Processor[Train]) -> None:
    processor.run(ONE, Train.book, 7, "Ann")

    trains.create({ONE: 99})

    assert seats_in(trains, ONE) == {7: "Ann"}
    assert len(trains.seat_map(ONE).train.seats) == 30


def test_two_processes_that_change_one_train_lose_nothing_and_see_no_error(
    url: str, trains: Store, processor: Processor[Train]
) -> None:
    def slowly(train: Train, seat: int, passenger: str) -> Ticket:
        gevent.sleep(0.05)
        return train.book(seat, passenger)

    with (
        store(url, {}) as elsewhere,
        Processor(open_resource=elsewhere.open_train, min_duration=0, max_duration=30, max_attempts=100) as other,
    ):
        booked = [
            gevent.spawn(one.run, ONE, slowly, seat, f"passenger {seat}")
            for seat, one in enumerate([processor, other] * 3, start=1)
        ]
        assert [each.get().seat for each in booked] == [1, 2, 3, 4, 5, 6]

    assert seats_in(trains, ONE) == {seat: f"passenger {seat}" for seat in range(1, 7)}


def test_a_failing_update_is_surely_not_saved(trains: Store, processor: Processor[Train]) -> None:
    def fail(_: sa.Connection, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return statement.replace("UPDATE seat_maps", "UPDATE nowhere"), parameters

    sa.event.listen(trains._engine, "before_cursor_execute", fail, retval=True)

    with pytest.raises(SaveFailed, match="nowhere") as failed:
        processor.run(ONE, Train.book, 7, "Ann")

    assert failed.value.retry_safe
    assert seats_in(trains, ONE) == {}


def test_what_a_failing_commit_did_is_unknown(trains: Store, processor: Processor[Train]) -> None:
    with faults(processor) as plan:
        plan.lose_answer()
        with pytest.raises(SaveFailed) as failed:
            processor.run(ONE, Train.book, 7, "Ann")

    assert not failed.value.retry_safe
    assert isinstance(failed.value.__cause__, ConnectionResetError)
    assert seats_in(trains, ONE) == {7: "Ann"}


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tickets.sqlite'}"


def test_a_train_that_somebody_else_changed_since_it_was_loaded_is_booked_again(sqlite_url: str) -> None:
    attempts: list[int] = []

    with (
        store(sqlite_url, {ONE: 30}) as here,
        store(sqlite_url, {}) as elsewhere,
        Processor(open_resource=here.open_train, min_duration=0, max_duration=30) as processor,
        Processor(open_resource=elsewhere.open_train, min_duration=0, max_duration=30) as other,
    ):

        def book(train: Train) -> None:
            attempts.append(train.changes)
            if len(attempts) == 1:
                other.run(ONE, Train.book, 1, "Ann")
            train.book(2, "Bob")

        processor.run(ONE, book)

        assert attempts == [0, 1]
        assert seats_in(here, ONE) == {1: "Ann", 2: "Bob"}


def test_a_locked_sqlite_file_is_given_up_with_nothing_written(sqlite_url: str) -> None:
    with (
        store(sqlite_url, {ONE: 30}) as here,
        Processor(open_resource=here.open_train, min_duration=0, max_duration=0.2) as processor,
    ):
        other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(SaveFailed) as failed:
            processor.run(ONE, Train.book, 2, "Bob")

        other.close()
        assert failed.value.retry_safe
        assert seats_in(here, ONE) == {}
        assert _connections_in_use(here) == 0


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    with database("postgresql", tmp_path) as url:
        yield url


def test_a_batch_that_waits_for_a_row_gives_up_in_the_database_too(postgres: str) -> None:
    with (
        store(postgres, {ONE: 30}) as trains,
        Processor(open_resource=trains.open_train, min_duration=0, max_duration=0.2) as processor,
        trains._engine.begin() as other,
    ):
        other.execute(sa.text("SELECT * FROM seat_maps FOR UPDATE"))
        # Whichever of the two clocks is first names it.
        with pytest.raises((BatchTimeout, LoadFailed)) as failed:
            processor.run(ONE, Train.book, 1, "Ann")
        assert failed.value.retry_safe

        wait_until(lambda: waiting_for_a_lock(trains) == 0)


def test_the_pool_is_as_good_as_new_after_timeouts_in_the_middle_of_a_statement(postgres: str) -> None:
    with store(postgres, {f"{n}": 30 for n in range(CONNECTIONS - 1)}) as trains:
        with (
            Processor(open_resource=trains.open_train, min_duration=0, max_duration=0.2) as processor,
            trains._engine.begin() as other,
        ):
            other.execute(sa.text("SELECT * FROM seat_maps FOR UPDATE"))
            callers = [gevent.spawn(processor.run, f"{n}", Train.book, 1, "Ann") for n in range(CONNECTIONS - 1)]
            # PostgreSQL ends the statements at about the same time as the batches end.
            assert {type(each.exception) for each in gevent.joinall(callers)} <= {BatchTimeout, LoadFailed}

        assert _connections_in_use(trains) == 0
        with ExitStack() as stack:
            connections = [stack.enter_context(trains._engine.connect()) for _ in range(CONNECTIONS)]
            assert [each.scalar(sa.text("SELECT 1")) for each in connections] == [1] * CONNECTIONS


@pytest.mark.parametrize("given", ["postgres://a:b@c/d", "postgresql://a:b@c/d"])
def test_postgresql_is_reached_through_psycopg_3(given: str) -> None:
    opened = Store(given)

    assert opened._engine.url.render_as_string(hide_password=False) == "postgresql+psycopg://a:b@c/d"


# The web layer.


@pytest.fixture(params=[True, False], ids=["batching", "batching=False"])
def client(request: pytest.FixtureRequest, sqlite_url: str) -> Iterator[Any]:
    app = create_app(Settings(sqlite_url, batching=request.param, max_pending=1))
    with check_operations(app.extensions["tickets"].processor):
        yield app.test_client()
    app.extensions["tickets"].processor.stop()
    app.extensions["tickets"].store.close()


SEAT = "/trains/Rack Railway/seats/3"
ANN = {"passenger": "Ann"}


def test_a_booking_shows_on_the_seat_map(client: Any) -> None:
    booked = client.post(SEAT, json=ANN)
    seat_map = client.get("/trains/Rack Railway/seats")

    assert (booked.status_code, booked.json) == (201, {"train": "Rack Railway", "seat": 3, "passenger": "Ann"})
    assert seat_map.json == {"train": "Rack Railway", "seats": 30, "taken": {"3": "Ann"}, "changes": 1, "saves": 1}


def test_a_booking_that_is_sent_again_is_the_same_one(client: Any) -> None:
    answers = [client.post(SEAT, json=ANN, headers={"Idempotency-Key": "8f14e45f"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json == answers[1].json == {"train": "Rack Railway", "seat": 3, "passenger": "Ann"}
    taken = [client.post(SEAT, json={"passenger": "Bob"}, headers={"Idempotency-Key": "bob"}) for _ in range(2)]
    assert [(answer.status_code, answer.json["error"]) for answer in taken] == [(409, "SeatTaken")] * 2
    assert client.get("/trains/Rack Railway/seats").json["changes"] == 1


def test_a_cancellation_that_is_sent_again_is_the_same_one(client: Any) -> None:
    client.post(SEAT, json=ANN)
    answers = [client.delete(SEAT, json=ANN, headers={"Idempotency-Key": "8f14e45f"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json == answers[1].json
    assert client.get("/trains/Rack Railway/seats").json["changes"] == 2
    wrong = client.delete(SEAT, json=ANN, headers={"Idempotency-Key": "a b"})
    assert (wrong.status_code, wrong.json["error"]) == (400, "Bad Request")


def test_an_idempotency_key_of_something_else_or_of_nothing_is_refused(client: Any) -> None:
    client.post(SEAT, json=ANN, headers={"Idempotency-Key": "a"})
    reused = client.post(SEAT, json={"passenger": "Bob"}, headers={"Idempotency-Key": "a"})
    assert (reused.status_code, reused.json["error"]) == (422, "IdempotencyKeyReused")
    wrong = client.post(SEAT, json=ANN, headers={"Idempotency-Key": "a b"})
    assert (wrong.status_code, wrong.json["error"]) == (400, "Bad Request")


def test_a_booking_whose_answer_was_lost_is_sent_again_and_is_the_same_one(client: Any) -> None:
    with faults(client.application.extensions["tickets"].processor) as plan:
        plan.lose_answer()
        unknown, sent_again = (client.post(SEAT, json=ANN, headers={"Idempotency-Key": "8f14e45f"}) for _ in range(2))
    assert (unknown.status_code, unknown.json["retry_safe"]) == (500, False)
    assert (sent_again.status_code, sent_again.json["passenger"]) == (201, "Ann")
    assert client.get("/trains/Rack Railway/seats").json["changes"] == 1


def test_who_books_while_the_database_is_away_is_told_to_come_again(client: Any) -> None:
    with faults(client.application.extensions["tickets"].processor) as plan:
        plan.fail_load(OSError("gone"))
        plan.fail_save(NotSaved("the disk is full"))
        answers = [client.post(SEAT, json=ANN) for _ in range(2)]
    assert [(answer.status_code, answer.json["retry_safe"]) for answer in answers] == [(503, True)] * 2
    assert client.get("/trains/Rack Railway/seats").json["taken"] == {}


def test_a_cancelled_seat_leaves_the_seat_map(client: Any) -> None:
    client.post(SEAT, json=ANN)

    assert client.delete(SEAT, json=ANN).status_code == 200
    assert client.get("/trains/Rack Railway/seats").json["taken"] == {}


@pytest.mark.parametrize(
    ("asked", "sent", "told"),
    [
        (("POST", SEAT), {"json": {"passenger": "Bob"}}, (409, "SeatTaken")),
        (("DELETE", SEAT), {"json": {"passenger": "Bob"}}, (403, "NotTheHolder")),
        (("POST", "/trains/Rack Railway/seats/31"), {"json": ANN}, (404, "UnknownSeat")),
        (("POST", "/trains/Nowhere/seats/3"), {"json": ANN}, (404, "UnknownTrain")),
        (("GET", "/trains/Nowhere/seats"), {}, (404, "UnknownTrain")),
        (("GET", "/trains/Nowhere"), {}, (404, "UnknownTrain")),
        (("POST", SEAT), {"json": {"passenger": ""}}, (400, "BadName")),
        (("POST", SEAT), {"json": {"passenger": 3}}, (400, "Bad Request")),
        (("POST", SEAT), {"json": ["Ann"]}, (400, "Bad Request")),
        (("POST", SEAT), {"data": "{", "content_type": "application/json"}, (400, "Bad Request")),
        (("POST", SEAT), {"data": ANN}, (415, "Unsupported Media Type")),
        (("POST", SEAT), {"json": {"passenger": "A" * 20_000}}, (413, "Request Entity Too Large")),
    ],
)
def test_whoever_is_refused_is_told_why(
    client: Any, asked: tuple[str, str], sent: dict[str, Any], told: tuple[int, str]
) -> None:
    client.post(SEAT, json=ANN)

    answer = client.open(asked[1], method=asked[0], **sent)

    assert (answer.status_code, answer.json["error"]) == told
    assert answer.json["detail"]


def test_who_comes_after_the_stop_is_told_to_come_again(client: Any) -> None:
    client.application.extensions["tickets"].processor.stop()

    answer = client.post(SEAT, json=ANN)

    assert (answer.status_code, answer.headers["Retry-After"], answer.json["error"]) == (503, "1", "TryAgain")


def test_who_comes_when_too_many_wait_is_told_to_come_again(client: Any) -> None:
    go_on = Event()
    processor = client.application.extensions["tickets"].processor
    waiting = gevent.spawn(processor.run, "Rack Railway", lambda _: go_on.wait())
    gevent.idle()

    answer = client.post(SEAT, json=ANN)
    go_on.set()
    waiting.get()

    assert (answer.status_code, answer.headers["Retry-After"], answer.json["error"]) == (503, "5", "TryAgain")


def test_an_unknown_outcome_is_called_so(client: Any) -> None:
    with faults(client.application.extensions["tickets"].processor) as plan:
        plan.lose_answer()
        answer = client.post(SEAT, json=ANN)

    assert (answer.status_code, answer.json["error"]) == (500, "OutcomeUnknown")
    assert "Retry-After" not in answer.headers


def test_the_pages_escape_names(client: Any) -> None:
    client.application.extensions["tickets"].store.create({"<b>'\"": 30})

    assert "<b>'" not in client.get("/").text + client.get("/trains/<b>'\"").text


def test_health_tells_whether_the_trains_are_there(client: Any) -> None:
    assert client.get("/healthz").json["trains"] == len(TRAINS)


def test_the_page_of_the_batches_is_for_who_is_near(client: Any) -> None:
    client.post(SEAT, json=ANN)
    page = client.get("/admin/batches")

    assert page.status_code == 200
    assert "Of 1 operations" in page.text
    for far in ({"REMOTE_ADDR": "10.0.0.1"}, {"HTTP_X_FORWARDED_FOR": "127.0.0.1"}):
        assert client.get("/admin/batches", environ_overrides=far).status_code == 403


def test_the_environment_decides() -> None:
    assert Settings.from_environment({}) == Settings()
    chosen = {"DATABASE_URL": "x", "BATCHING": "off", "MAX_PENDING": "7", "MAX_DURATION": "1.5", "BACKEND": "2"}
    chosen["ADMIN_ADDRESSES"] = "::1, 10.0.0.1"
    addresses = frozenset({"::1", "10.0.0.1"})
    assert Settings.from_environment(chosen) == Settings("x", False, 7, 1.5, addresses, "2")
    with pytest.raises(ValueError, match="BATCHING"):
        Settings.from_environment({"BATCHING": "no"})


# The load's own check.


@pytest.mark.parametrize(
    ("held", "unsure", "answered", "agrees"),
    [
        ({"Ann": [3]}, [], 1, True),
        ({"Ann": [4]}, [], 1, False),
        ({"Bob": [3]}, [], 1, False),
        ({}, [], 1, False),
        ({"Ann": [3]}, [], 0, False),
        ({"Ann": [3]}, [], 2, False),
        ({}, [3], 0, True),
    ],
)
def test_the_load_notices_when_the_database_says_something_else(
    held: dict[str, list[int]], unsure: list[int], answered: int, agrees: bool
) -> None:
    before, after = SeatMap(Train.empty(ONE, 30), saves=0), SeatMap(Train.empty(ONE, 30), saves=1)
    after.train.book(3, "Ann")

    report = Report(held=held, unsure=unsure, statuses=Counter({"201": answered}))

    assert (differences(report, before, after) == []) is agrees


# The whole application: gunicorn with two workers, and 200 clients at once.

CLIENTS = 200
SMALL = {f"Shuttle {n}": 4 for n in range(50)}


@pytest.fixture(
    params=[
        pytest.param(("sqlite", True), id="sqlite"),
        pytest.param(("postgresql", True), id="postgresql"),
        pytest.param(("sqlite", False), id="sqlite, batching=False", marks=pytest.mark.variants),
        pytest.param(("postgresql", False), id="postgresql, batching=False", marks=pytest.mark.variants),
    ],
    scope="module",
)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Store, bool]]:
    kind, batching = request.param
    directory = tmp_path_factory.mktemp("running")
    with (
        database(kind, directory) as url,
        store(url, {ONE: 30, **SMALL}) as trains,
        tickets(url, directory, batching=batching) as server,
    ):
        yield server, trains, batching


def test_200_clients_that_fight_for_30_seats_and_the_database_agree(running: tuple[Server, Store, bool]) -> None:
    server, trains, batching = running
    wishes = {f"client {n}": [(ONE, 1 + n % 30), *[(ONE, random.randint(1, 30)) for _ in range(2)]] for n in range(200)}

    told, statuses = _all_book(server, wishes)

    assert told[ONE] == seats_in(trains, ONE)
    assert sorted(told[ONE]) == list(range(1, 31))
    _check_that_nobody_saw_an_error(statuses, batching)


def test_200_clients_that_fight_for_seats_on_50_trains_and_the_database_agree(
    running: tuple[Server, Store, bool],
) -> None:
    server, trains, batching = running
    wishes = {
        f"client {n}": [(f"Shuttle {(n + step) % 50}", random.randint(1, 4)) for step in range(3)] for n in range(200)
    }

    told, statuses = _all_book(server, wishes)

    assert told == {name: seats for name in SMALL if (seats := seats_in(trains, name))}
    _check_that_nobody_saw_an_error(statuses, batching)


Told = dict[str, dict[int, str]]


def _all_book(server: Server, wishes: dict[str, list[tuple[str, int]]]) -> tuple[Told, Counter[int]]:
    """Let each client ask for its seats one after the other; give who was told to have which, and all statuses."""
    told: Told = defaultdict(dict)
    statuses: Counter[int] = Counter()

    def book(name: str) -> None:
        for train, seat in wishes[name]:
            status = _book_until_decided(server, f"/trains/{train.replace(' ', '%20')}/seats/{seat}", name, statuses)
            if status == 201:
                assert seat not in told[train], "sold twice"
                told[train][seat] = name

    clients = [gevent.spawn(book, name) for name in wishes]
    gevent.joinall(clients, raise_error=True)
    return {train: seats for train, seats in told.items() if seats}, statuses


def _book_until_decided(server: Server, path: str, name: str, statuses: Counter[int]) -> int:
    status = 503
    while status == 503:
        status, _ = ask(server, "POST", path, {"passenger": name})
        statuses[status] += 1
    return status


def _check_that_nobody_saw_an_error(statuses: Counter[int], batching: bool) -> None:
    # Without batching, many replay against each other, and some are told to try again.
    assert statuses.keys() <= ({201, 409} if batching else {201, 409, 503})


def _connections_in_use(opened: Store) -> int:
    pool = opened._engine.pool
    assert isinstance(pool, sa.QueuePool)
    return pool.checkedout()


def test_the_seconds_and_the_requests_of_the_table_are_its_operations(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("batching", MEANING)
    for seconds in (2.5, 4.1):
        row.add(seconds, [0.1] * 400, Counter({"201": 390, "409": 7, "503": 3}), 390, 39)
    show([row])
    (line,) = re.findall("^batching .*", capsys.readouterr().out, re.MULTILINE)
    _, seconds_told, rate, _, _, operations, batches, _, refused, again, unknown = line.split()
    assert (seconds_told, rate, operations, batches) == ("6.6", "121", "780", "78")
    assert round(6.6 * 121.2) == sum(map(int, (operations, refused, again, unknown)))
