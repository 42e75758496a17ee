"""Huey's tasks in a consumer of ours that ends: what was admitted is saved, and a task that is retried applies once."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huey import MemoryHuey
from huey.exceptions import ConfigurationError

import geventbatch
from geventbatch.integrations.huey import consume
from tests.support.servers import side_by_side, wait_until
from tests.support.task_worker import TaskWorker, task_worker, words_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

PROGRAM = "tests.support.programs.huey_app"


def huey(folder: Path) -> AbstractContextManager[TaskWorker]:
    return task_worker(folder, PROGRAM, [sys.executable, "-m", PROGRAM, "consume"])


def test_a_consumer_that_ends_has_saved_what_its_tasks_wait_for_and_what_none_waits_for(tmp_path: Path) -> None:
    def ends(sent: signal.Signals) -> None:
        with huey(tmp_path / sent.name) as worker:
            worker.send(add_later=3, add=60)
            worker.open_gates("load later")
            wait_until(lambda: len(worker.notes("entered")) == 40 and "later" in worker.notes("saving"))
            assert int(worker.notes("frozen")[0]) > 10_000  # objects, which the garbage collector leaves out
            worker.open_gates("load waited for")
            wait_until(lambda: "waited for" in worker.notes("saving"))

            worker.process.send_signal(sent)
            wait_until(lambda: "Shutting down gracefully" in worker.log())
            if sent == signal.SIGTERM:
                for later in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # they cut nothing short
                    worker.process.send_signal(later)
            assert worker.saved() == []
            worker.open_gates("save waited for")
            wait_until(lambda: "All workers have stopped." in worker.log())
            assert worker.saved() == sorted(worker.notes("finished"))
            assert len(worker.saved()) == 40
            if sent == signal.SIGTERM:
                worker.process.send_signal(sent)  # nor does it behind them
            worker.open_gates("save later")

            if sent == signal.SIGTERM:
                assert worker.process.wait(45) == 0
                assert set(words_of("add_later", 3)) < set(worker.saved())
                worker.start_again()
            wait_until(lambda: len(worker.notes("finished")) == 60)
            assert worker.saved() == words_of("add", 60) + words_of("add_later", 3)
            assert len(worker.notes("booted")) == 2  # at SIGHUP it starts anew by itself
            assert "Traceback" not in worker.log()

    side_by_side(ends, (signal.SIGTERM,), (signal.SIGHUP,))


def test_a_signal_at_which_huey_drops_its_tasks_saves_what_they_had_started(tmp_path: Path) -> None:
    with huey(tmp_path / "worker") as worker:
        worker.send(add_later=3, add=40)
        worker.open_gates("load later")
        wait_until(lambda: len(worker.notes("entered")) == 40 and "later" in worker.notes("saving"))
        worker.open_gates("load waited for")
        wait_until(lambda: "waited for" in worker.notes("saving"))

        worker.process.send_signal(signal.SIGINT)
        wait_until(lambda: worker.log().count("did not finish") == 40)
        assert worker.saved() == []
        worker.open_gates("save waited for", "save later")
        assert worker.process.wait(45) == 0
        assert worker.saved() == words_of("add", 40) + words_of("add_later", 3)
        assert worker.notes("finished") == []


def test_a_task_that_is_retried_after_a_timeout_applies_once_with_its_id_as_idempotency_key(tmp_path: Path) -> None:
    with huey(tmp_path / "worker") as worker:
        worker.send(count_briefly=12)
        wait_until(lambda: len(set(worker.notes("interrupted"))) == 12)  # the first of them in the middle of a save
        worker.open_gates("commit", "return")
        wait_until(lambda: len(set(worker.notes("finished"))) == 12)
        assert worker.ledger() == words_of("count_briefly", 12)


def test_a_huey_that_was_made_before_gevent_patched_is_refused() -> None:
    def consumes(lines: list[str], told: str) -> None:
        program = [
            "from gevent import monkey",
            "from huey import RedisHuey, SqliteHuey",
            "from geventbatch.integrations.huey import consume",
            *lines,
            "consume(huey)",
        ]
        ran = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=False)
        assert told in ran.stderr.splitlines()[-1]

    patch, redis, sqlite = "monkey.patch_all()", "huey = RedisHuey()", "huey = SqliteHuey(filename=':memory:')"
    side_by_side(
        consumes,
        ([redis], "gevent has not patched: a task that waits would block all other tasks"),
        ([redis, patch], "gevent has patched after <huey.api.RedisHuey"),
        ([sqlite, patch], "gevent has patched after <huey.api.SqliteHuey"),
        ([patch, redis, "huey.immediate = True"], "ConfigurationError"),  # of Huey, behind our check
    )


def test_the_first_run_under_huey_consumer_warns_of_it(tmp_path: Path) -> None:
    program = str(Path(sysconfig.get_path("scripts"), "huey_consumer"))
    command = [program, "--worker-type", "greenlet", f"{PROGRAM}.huey"]  # the module patches, after Huey is loaded
    with task_worker(tmp_path / "worker", PROGRAM, command) as worker:
        worker.send(add=1)
        worker.open_gates("load waited for", "save waited for")
        wait_until(lambda: worker.notes("finished"))
        assert worker.log().count("huey_consumer drops the running tasks at SIGTERM, and it is patched too late") == 1
        assert "consume(huey)" in worker.log()


def test_a_hook_of_each_worker_that_stops_processors_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    huey = MemoryHuey(immediate=True)  # so that Huey refuses to start

    def stop() -> None:
        geventbatch.stop_all(timeout=20)

    def close() -> None:
        """What else a worker may do as it ends."""

    for hook in (stop, geventbatch.stop_all, functools.partial(geventbatch.stop_all, timeout=20), close):
        huey.on_shutdown(repr(hook))(hook)
    with pytest.raises(ConfigurationError):
        consume(huey)
    lines = [one.getMessage() for one in caplog.records if "hook" in one.getMessage()]
    assert [line.split(", a hook of @huey.on_shutdown, stops processors")[0] for line in lines] == [
        f"{test_a_hook_of_each_worker_that_stops_processors_is_warned_of.__name__}.<locals>.stop",
        "stop_all",
        f"{functools.partial(geventbatch.stop_all, timeout=20)}",
    ]


def test_what_the_consumer_decides_is_no_option(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TypeError, match="worker_type"):
        consume(MemoryHuey(), worker_type="thread")
    with pytest.raises(TypeError, match="worker_count"):
        consume(MemoryHuey(), worker_count=2)
