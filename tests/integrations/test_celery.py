"""A Celery worker on gevent that is told to end: what was answered is saved, and so is what nobody waits for."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tests.support.servers import side_by_side, wait_until
from tests.support.task_worker import TaskWorker, task_worker, words_of

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.support.programs.celery_app"


class Worker:
    """A Celery worker with `tests.support.programs.celery_app`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder = folder
        for name in ("sent", "queue", "control", "results"):
            (folder / name).mkdir(parents=True)
        self._environment = {**os.environ, "FOLDER": str(folder), **environment}
        command = [sys.executable, "-m", "celery", "--app", PROGRAM, "worker", "--pool", "gevent", "-c", "20"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--without-mingle", "--without-gossip", "--without-heartbeat"],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def send(self, task: str, count: int) -> None:
        command = [sys.executable, "-m", PROGRAM, task, str(count)]
        subprocess.run(command, cwd=ROOT, env={**self._environment, "OUT": "sent"}, check=True)
        for message in sorted((self._folder / "sent").iterdir()):
            message.rename(self._folder / "queue" / message.name)  # a worker would read one that is half written

    def end(self, sent: signal.Signals) -> None:
        """Wait until it has ended by itself.

        Celery does all the work of a cold shutdown in its signal handler, in whatever greenlet that comes upon, and was
        once seen not to return from there. As long as it has not called us, that is not ours to mend, and what it
        answered has to be saved all the same.
        """
        try:
            self.process.wait(45)
        except subprocess.TimeoutExpired:
            if sent != signal.SIGQUIT or "worker_shutdown" in self.notes():
                raise
            self.process.kill()
            self.process.wait()

    def succeeded(self) -> list[str]:
        """Give the results of the tasks that were answered as success."""
        # By name, since Celery tries out whether it can write there, and takes away what it wrote.
        answers = [answer_in(one.read_text()) for one in (self._folder / "results").glob("celery-task-meta-*")]
        return sorted(answer["result"] for answer in answers if answer.get("status") == "SUCCESS")

    def queued(self) -> int:
        return len(list((self._folder / "queue").iterdir()))

    def saved(self) -> list[str]:
        return sorted(self._lines("saved"))

    def notes(self) -> list[str]:
        return self._lines("notes")

    def open_gate(self, name: str = "gate") -> None:
        (self._folder / name).touch()

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def _lines(self, name: str) -> list[str]:
        file = self._folder / name
        return file.read_text().split() if file.exists() else []


def answer_in(text: str) -> dict[str, Any]:
    """What Celery has written, or nothing while that is not whole: it does not do it in one step."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


@contextmanager
def celery(folder: Path, **environment: str) -> Iterator[Worker]:
    worker = Worker(folder, **environment)
    try:
        yield worker
    except BaseException as error:
        error.add_note(worker.log())
        raise
    finally:
        worker.process.kill()
        worker.process.wait()


def test_a_worker_that_ends_has_saved_all_that_it_answered_and_what_no_task_waits_for(tmp_path: Path) -> None:
    def under_load(sent: signal.Signals) -> None:
        with celery(tmp_path / sent.name) as worker:
            worker.open_gate()
            worker.send("add", 200)
            wait_until(lambda: len(worker.saved()) > 40)
            worker.process.send_signal(sent)
            wait_until(lambda: re.search("worker: (Warm|Hitting)", worker.log()))  # it has begun to end
            worker.open_gate("second-gate")  # else all would be saved before a signal that comes late

            worker.end(sent)
            assert 40 < len(worker.saved()) < 200
            if sent == signal.SIGQUIT:  # a cold shutdown, which cuts tasks off
                assert set(worker.succeeded()) <= set(worker.saved())
            else:
                assert worker.succeeded() == worker.saved()
                assert len(worker.saved()) + worker.queued() == 200
                assert "Traceback" not in worker.log()

    def with_nobody_waiting() -> None:
        with celery(tmp_path / "later") as worker:
            worker.send("add_later", 3)
            wait_until(lambda: len(worker.succeeded()) == 3)
            worker.process.terminate()
            wait_until(lambda: "worker_shutdown" in worker.notes())
            assert worker.saved() == []
            worker.open_gate()

            assert worker.process.wait(45) == 0
            assert worker.saved() == ["word0", "word1", "word2"]

    loads = [(under_load, sent) for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)]
    side_by_side(lambda run, *case: run(*case), (with_nobody_waiting,), *loads)


def test_the_collector_leaves_out_what_a_worker_has_loaded_unless_that_is_refused(tmp_path: Path) -> None:
    def frozen(name: str, refused: str) -> int:
        with celery(tmp_path / name, GEVENTBATCH_FREEZE=refused) as worker:
            wait_until(lambda: any(note.startswith("frozen=") for note in worker.notes()))
            return int(worker.notes()[-1].removeprefix("frozen="))

    assert frozen("freezes", "") > 10_000
    assert frozen("refuses", "0") == 0


WORDS = "tests.support.programs.celery_words"


def with_words(folder: Path) -> AbstractContextManager[TaskWorker]:
    program = str(Path(sysconfig.get_path("scripts"), "celery"))  # "python -m celery" does not start anew at SIGHUP
    command = [program, "--app", WORDS, "worker", "--pool", "gevent", "-c", "40"]
    command += ["--without-mingle", "--without-gossip", "--without-heartbeat", "--loglevel", "INFO"]
    return task_worker(folder, WORDS, command, VISIBILITY_TIMEOUT="3600")


def test_a_worker_that_starts_anew_has_saved_all_before_and_goes_on(tmp_path: Path) -> None:
    with with_words(tmp_path / "worker") as worker:
        worker.send(add_later=3, add=60)
        worker.open_gates("load later")
        wait_until(lambda: len(worker.notes("entered")) == 40 and "later" in worker.notes("saving"))
        worker.open_gates("load waited for")
        wait_until(lambda: "waited for" in worker.notes("saving"))

        worker.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "Restarting celery worker" in worker.log())
        assert worker.saved() == []
        worker.open_gates("save waited for")
        wait_until(lambda: len(worker.notes("finished")) >= 40)  # it begins some more before it is told
        worker.open_gates("save later")
        wait_until(lambda: len(worker.notes("finished")) == 60)
        assert worker.log().count("celery@") >= 2
        assert worker.saved() == words_of("add", 60) + words_of("add_later", 3)


def test_what_a_cut_off_task_had_started_is_saved_and_applied_once_with_its_id_as_idempotency_key(
    tmp_path: Path,
) -> None:
    def by_a_kill() -> None:
        with with_words(tmp_path / "killed") as worker:
            worker.send(count=8)
            worker.open_gates("commit")
            wait_until(lambda: len(set(worker.notes("applied"))) == 8)  # saved, and not acknowledged
            worker.kill()
            worker.open_gates("return")
            worker.start_again(VISIBILITY_TIMEOUT="1")  # if the first had it, a task that it gets again could be lost
            wait_until(lambda: len(set(worker.notes("finished"))) == 8)
            assert len(worker.notes("entered")) >= 16  # more, if it takes so long that it gets some again
            assert worker.ledger() == words_of("count", 8)

    def by_a_time_limit() -> None:
        with with_words(tmp_path / "limit") as worker:
            worker.send(count_briefly=1)
            wait_until(lambda: worker.notes("interrupted"))
            worker.process.terminate()
            wait_until(lambda: "worker: Warm" in worker.log())
            assert worker.ledger() == []
            worker.open_gates("commit")
            assert worker.process.wait(45) == 0
            assert worker.ledger() == ["count_briefly0"]
            assert worker.notes("finished") == []

    side_by_side(lambda run: run(), (by_a_kill,), (by_a_time_limit,))
