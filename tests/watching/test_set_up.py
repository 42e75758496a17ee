"""Processors that would lose changes or time out are told of: when made, by integrations, and by `check_setup`."""

from __future__ import annotations

import signal
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import redis
import sqlalchemy as sa
from flask import Flask

from geventbatch import Conflict, Processor, SetupProblem, check_setup
from geventbatch._watch import setup_problems
from geventbatch.integrations.flask import GeventBatch
from geventbatch.integrations.gunicorn import _Hooks
from geventbatch.integrations.wsgi import ErrorAnswers
from geventbatch.stores import RedisStore, SQLAlchemyStore
from geventbatch.testing import check_operations
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SEVERAL = {"wsgi.multiprocess": True, "REQUEST_METHOD": "GET"}
ALONE = {"wsgi.multiprocess": False, "REQUEST_METHOD": "GET"}

pytestmark = pytest.mark.usefixtures("no_other_processors")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_problems, "_workers", type(setup_problems._workers)())
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


def load(key: object) -> list[int]:
    return []


def save(key: object, resource: object) -> None: ...


def load_all(keys: list[Any]) -> dict[Any, list[int]]:
    return {key: [] for key in keys}


def save_all(resources: object) -> None: ...


@contextmanager
def by_hand(key: object) -> Iterator[list[int]]:
    yield []


def names() -> list[str]:
    return [problem.name for problem in check_setup()]


def told(call: Callable[[], object]) -> list[str]:
    """What *call* warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.category is RuntimeWarning for one in caught)
    return [str(one.message) for one in caught]


# -- a load without a save -------------------------------------------------------------------------------------------


def test_a_load_without_a_save_is_warned_of_where_the_processor_is_made_and_in_check() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        processor = Processor(load_resource=load, min_duration=0, name="trains")
    (warning,) = caught
    assert warning.filename == __file__
    assert "The processor trains has a load_resource without save_resource" in str(warning.message)
    assert "answered, and never saved" in str(warning.message)
    assert "save_resource=lambda key, resource: None" in str(warning.message)
    (problem,) = check_setup()
    assert problem.name == "unsaved"
    assert str(problem) == str(warning.message)
    assert told(lambda: processor.run("k", list.append, 1)) == []
    processor.stop()
    assert check_setup() == []


def test_a_processor_without_a_name_is_told_by_the_place_of_its_load() -> None:
    made: list[Processor[Any]] = []
    (warning,) = told(lambda: made.append(Processor(load_resource=lambda _: [], min_duration=0)))
    assert f"<lambda> ({__file__}:" in warning
    assert made[0].stop()


def test_a_load_without_a_save_is_told_of_in_flask_and_under_a_checker_too() -> None:
    app = Flask("trains")
    words = GeventBatch(app)
    (warning,) = told(lambda: words.processor(load_resource=load, min_duration=0))
    assert "The processor load has a load_resource without save_resource" in warning
    with check_operations():
        assert names() == ["unsaved"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_resource": save},
        {"load_resource": load, "save_resource": save},
        {"load_resources": load_all, "save_resources": save_all},
        {"open_resource": by_hand},
    ],
    ids=str,
)
def test_of_what_saves_or_loads_nothing_there_is_nothing_to_say(options: dict[str, Any]) -> None:
    assert told(lambda: Processor(min_duration=0, **options)) == []
    processor = Processor(min_duration=0, **options)
    assert processor.stop()
    assert check_setup() == []


# -- a pair with several workers -------------------------------------------------------------------------------------

PAIRS: list[dict[str, Any]] = [
    {"load_resource": load, "save_resource": save},
    {"load_resources": load_all, "save_resources": save_all},
]
UNCOMPARED = "a pair of functions, which compares nothing, and more than one worker process serves"


def worker(number: int) -> Any:
    """A worker of gunicorn's, of so many, and what it logs."""
    logged: list[str] = []
    return SimpleNamespace(
        cfg=SimpleNamespace(graceful_timeout=30),
        server=SimpleNamespace(num_workers=number),
        log=SimpleNamespace(warning=lambda line, *values: logged.append(line % values)),
        handle_exit=signal.getsignal(signal.SIGHUP),
        logged=logged,
    )


def under_gunicorn(number: int) -> list[str]:
    hooks, one = _Hooks(), worker(number)
    hooks._workers = one.server.num_workers
    hooks.post_worker_init(one)
    return list(one.logged)


def in_flask(environ: dict[str, Any]) -> list[str]:
    app = Flask("trains")
    GeventBatch(app)
    app.add_url_rule("/", view_func=lambda: "")
    client = app.test_client()
    first = told(lambda: client.get("/", environ_overrides=environ))
    assert told(lambda: client.get("/", environ_overrides=environ)) == []
    return first


def application(environ: object, start_response: object) -> Iterable[bytes]:
    return []


def under_wsgi(environ: dict[str, Any]) -> list[str]:
    app: Any = ErrorAnswers(application)
    first = told(lambda: app(environ, None))
    assert told(lambda: app(environ, None)) == []
    return first


@pytest.mark.parametrize("options", PAIRS, ids=["one", "many"])
@pytest.mark.parametrize("see", [in_flask, under_wsgi])
def test_a_pair_is_warned_of_once_in_the_first_request_of_a_server_with_several_workers(
    see: Callable[[dict[str, Any]], list[str]], options: dict[str, Any]
) -> None:
    processor = Processor(min_duration=0, name="trains", **options)
    assert check_setup() == []
    assert see(ALONE) == []
    assert check_setup() == []
    (warning,) = see(SEVERAL)
    assert f"The processor trains loads and saves by {UNCOMPARED}" in warning
    assert "Use a store" in warning
    assert "compares=True" in warning
    assert see(SEVERAL) == []
    assert under_gunicorn(2) == []
    assert names() == ["uncompared"]
    assert processor.stop()


@pytest.mark.parametrize("options", PAIRS, ids=["one", "many"])
def test_gunicorn_s_log_has_it_once_and_a_processor_that_is_made_later_warns(options: dict[str, Any]) -> None:
    early = Processor(min_duration=0, name="early", **options)
    assert under_gunicorn(1) == []
    (line,) = under_gunicorn(2)
    assert f"The processor early loads and saves by {UNCOMPARED}" in line
    assert under_gunicorn(3) == in_flask(SEVERAL) == []
    late: list[Processor[Any]] = []
    (warning,) = told(lambda: late.append(Processor(min_duration=0, name="late", **options)))
    assert "The processor late loads" in warning
    assert names() == ["uncompared", "uncompared"]
    assert early.stop()
    assert late[0].stop()


@pytest.mark.parametrize(
    ("variable", "numproc", "number"),
    [("2", None, 2), ("1", None, 1), ("many", None, 1), ("", None, 1), ("", 4, 4), ("4", 1, 1)],
)
def test_the_number_is_that_of_uwsgi_or_of_the_platform_where_no_integration_says(
    monkeypatch: pytest.MonkeyPatch, variable: str, numproc: int | None, number: int
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", variable)
    if numproc is not None:
        monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(numproc=numproc))
    warned = told(lambda: Processor(min_duration=0, **PAIRS[0]))
    assert len(warned) == (number > 1)
    assert setup_problems.know_workers(1) == []
    assert told(lambda: Processor(min_duration=0, **PAIRS[0])) == []


@pytest.mark.parametrize(
    "options",
    [*[{**pair, "compares": True} for pair in PAIRS], {"open_resource": by_hand}, {}],
    ids=["one", "many", "by hand", "nothing"],
)
def test_what_compares_is_not_warned_of(options: dict[str, Any]) -> None:
    setup_problems.know_workers(2)
    processors: list[Processor[Any]] = []
    assert told(lambda: processors.append(Processor(min_duration=0, **options))) == []
    app = Flask("trains")
    with app.app_context():
        declared = GeventBatch(app).processor(min_duration=0, **options)
        assert check_setup() == []
        assert declared.for_app().stop()
    assert processors[0].stop()


def test_compares_is_a_flag_of_pairs() -> None:
    app = Flask("trains")
    for make in (Processor, GeventBatch(app).processor):
        loose: Any = make
        assert "compares is 1, but must be True or False" in str(answer_of(loose, **PAIRS[0], compares=1))
        for opener in ({"open_resource": by_hand}, {"open_resources": by_hand}):
            refused = answer_of(loose, **opener, compares=True)
            assert type(refused) is TypeError
            assert str(refused).startswith("compares says of a pair")


def test_a_pair_that_compares_loses_nothing_to_somebody_else() -> None:
    kept: dict[str, Any] = {"version": 1, "numbers": []}

    def load(key: object) -> dict[str, Any]:
        return {**kept, "numbers": list(kept["numbers"])}

    def save(key: object, found: dict[str, Any]) -> None:
        if found["version"] != kept["version"]:
            raise Conflict
        kept.update(version=found["version"] + 1, numbers=found["numbers"])

    def add(found: dict[str, Any], number: int) -> None:
        if number not in kept["numbers"] and len(kept["numbers"]) < 2:
            kept.update(version=kept["version"] + 1, numbers=[*kept["numbers"], number * 10])  # another worker
        found["numbers"].append(number)

    with Processor(load_resource=load, save_resource=save, compares=True, min_duration=0, max_attempts=9) as processor:
        processor.run("k", add, 1)
    assert kept["numbers"] == [10, 10, 1]


# -- a server and little time ----------------------------------------------------------------------------------------


def open_redis() -> Any:
    return RedisStore(redis.Redis())


def documents(url: str) -> Any:
    engine = sa.create_engine(url)
    return SQLAlchemyStore.documents(engine, "trains")


POSTGRES = "postgresql+psycopg://"


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({"open_resource": documents(POSTGRES)}, 0.2),
        ({"open_resource": documents(POSTGRES), "max_duration": 0.9}, 0.9),
        ({"open_resources": documents(POSTGRES).open_resources}, 0.2),
        ({"open_resource": open_redis()}, 0.2),
        ({"open_resources": open_redis().open_resources}, 0.2),
    ],
    ids=str,
)
def test_a_server_store_with_less_than_a_second_is_in_check(options: dict[str, Any], seconds: float) -> None:
    processor = Processor(name="trains", **options)
    (problem,) = check_setup()
    assert problem.name == "short-deadline"
    assert problem.what.startswith(f"The processor trains has a max_duration of {seconds} s over a database server")
    assert "Pass max_duration, in seconds" in problem.mend
    assert processor.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"open_resource": documents(POSTGRES), "min_duration": 0},
        {"open_resource": documents(POSTGRES), "max_duration": 1},
        {"open_resource": documents("sqlite://")},
        {"open_resources": documents("sqlite://").open_resources},
        {"open_resource": by_hand},
    ],
    ids=str,
)
def test_one_with_time_or_without_a_server_is_not(options: dict[str, Any]) -> None:
    processor = Processor(**options)
    assert check_setup() == []
    assert processor.stop()


def test_it_is_a_problem_like_any_other() -> None:
    assert all(isinstance(one, SetupProblem) for one in setup_problems.problems())
