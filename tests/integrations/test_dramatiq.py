"""Dramatiq's workers on gevent that end: what was admitted is saved, and a message that comes again applies once."""

from __future__ import annotations

import signal
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.servers import side_by_side, wait_until
from tests.support.task_worker import TaskWorker, task_worker, words_of

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

PROGRAM = "tests.support.programs.dramatiq_app"


def dramatiq(folder: Path) -> AbstractContextManager[TaskWorker]:
    program = Path(sysconfig.get_path("scripts"), "dramatiq-gevent")
    command = [str(program), "--processes", "1", "--threads", "40", PROGRAM]
    return task_worker(folder, PROGRAM, command, dramatiq_worker_timeout="100")  # milliseconds between looks at an end


def test_a_worker_that_ends_has_saved_what_its_messages_wait_for_and_what_none_waits_for(tmp_path: Path) -> None:
    def ends(sent: signal.Signals) -> None:
        with dramatiq(tmp_path / sent.name) as worker:
            worker.send(add_later=3, add=60)
            worker.open_gates("load later")
            wait_until(lambda: len(worker.notes("entered")) == 40 and "later" in worker.notes("saving"))
            assert int(worker.notes("frozen")[0]) > 10_000  # objects, which the garbage collector leaves out
            worker.open_gates("load waited for")
            wait_until(lambda: "waited for" in worker.notes("saving"))

            worker.process.send_signal(sent)
            wait_until(lambda: worker.notes("ending"))
            assert worker.saved() == []
            worker.open_gates("save waited for")
            wait_until(lambda: worker.notes("ended"))
            assert worker.saved() == sorted(worker.notes("finished"))
            assert len(worker.saved()) == 40
            worker.open_gates("save later")

            if sent != signal.SIGHUP:  # at which it starts anew by itself
                assert worker.process.wait(45) == 0
                assert set(words_of("add_later", 3)) < set(worker.saved())
                worker.start_again()
            wait_until(lambda: len(worker.notes("finished")) == 60)
            assert worker.saved() == words_of("add", 60) + words_of("add_later", 3)
            assert "Traceback" not in worker.log()

    side_by_side(ends, (signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP,))


def test_a_message_that_comes_again_applies_once_with_its_id_as_idempotency_key(tmp_path: Path) -> None:
    def after_a_time_limit_that_is_too_short() -> None:
        with dramatiq(tmp_path / "limit") as worker:
            worker.send(count_briefly=12)
            wait_until(lambda: len(set(worker.notes("interrupted"))) == 12)  # the first of them in the middle of a save
            worker.open_gates("commit", "return")
            wait_until(lambda: len(set(worker.notes("finished"))) == 12)
            assert worker.ledger() == words_of("count_briefly", 12)

    def after_a_killed_worker() -> None:
        with dramatiq(tmp_path / "killed") as worker:
            worker.send(count=12)
            worker.open_gates("commit")
            wait_until(lambda: len(set(worker.notes("applied"))) == 12)  # saved, and not acknowledged
            worker.kill()
            worker.open_gates("return")
            worker.start_again()
            wait_until(lambda: len(set(worker.notes("finished"))) == 12)
            assert len(worker.notes("entered")) >= 24
            assert worker.ledger() == words_of("count", 12)

    side_by_side(lambda run: run(), (after_a_time_limit_that_is_too_short,), (after_a_killed_worker,))
