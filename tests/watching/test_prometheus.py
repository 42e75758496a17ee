"""Metrics for Prometheus: what is counted is right, in one process and in several; what is drawn of it is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import gevent
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from geventbatch import BatchTimeout, Conflict, Processor, ProcessorOverloaded
from geventbatch._core import process
from geventbatch.integrations import prometheus
from tests.support.callers import answer_of, in_a_thread
from tests.support.servers import side_by_side, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime

pytestmark = pytest.mark.usefixtures("no_other_processors")

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "tests/support/programs/prometheus.conf.py"
DASHBOARD = ROOT / "docs/grafana/geventbatch.json"
ALERTS = ROOT / "docs/grafana/alerts.yml"
OUTCOMES = ["returned", "raised", "failed", "unknown", "withdrawn", "refused"]


@contextmanager
def watched(registry: CollectorRegistry) -> Iterator[CollectorRegistry]:
    prometheus.watch(registry)
    export = prometheus._exports[registry]
    try:
        yield registry
    finally:
        export._close_timer()
        process.watchers.remove(export.add)
        process._at_first_run.remove(export._start)
        process._after_fork.remove(export._forget)
        del prometheus._exports[registry]


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    with watched(CollectorRegistry()) as registry:
        yield registry


def nothing(resource: object, *args: object) -> None:
    """An operation, a load or a save."""


def sleeping(seconds: float) -> Callable[..., None]:
    def sleep(*args: object) -> None:
        gevent.sleep(seconds)

    return sleep


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: object) -> None:
        raise error

    return raise_it


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """What a scrape shows of the processor "trains"."""
    return registry.get_sample_value(f"geventbatch_{name}", {"processor": "trains", **labels})


def outcomes(registry: CollectorRegistry) -> dict[str, float]:
    """Those that there were."""
    counts = {outcome: value(registry, "operations_total", outcome=outcome) for outcome in OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


def unrefreshed(registry: CollectorRegistry, name: str) -> float:
    """What the scrape of another process would show."""
    text = generate_latest(registry.restricted_registry([f"geventbatch_{name}"])).decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if "trains" in line)


# Batches and operations


def test_a_batch_is_in_every_histogram(clock: VirtualTime, registry: CollectorRegistry) -> None:
    with Processor(
        load_resource=sleeping(1),
        save_resource=sleeping(2),
        min_duration=0,
        max_duration=50,
        max_batches=1,
        name="trains",
    ) as processor:
        callers = [gevent.spawn(processor.run, key, sleeping(0.25)) for key in "aab"]
        gevent.joinall(callers, raise_error=True)
        assert value(registry, "max_duration_seconds") == 50
    sums = {
        name: value(registry, f"batch_{name}_sum")
        for name in (
            "operations",
            "wait_seconds",
            "load_seconds",
            "apply_seconds",
            "save_seconds",
            "seconds",
        )
    }
    assert sums == {
        "operations": 3,
        "wait_seconds": 3.5,
        "load_seconds": 2,
        "apply_seconds": 0.75,
        "save_seconds": 4,
        "seconds": 6.75,
    }
    assert value(registry, "batch_seconds_count") == 2
    assert value(registry, "batch_operations_bucket", le="1.0") == 1


@pytest.mark.parametrize("batching", [True, False])
def test_operations_are_counted_by_what_became_of_them(
    clock: VirtualTime, registry: CollectorRegistry, batching: bool
) -> None:
    failing = [Conflict(), OSError("disk full")]

    def save(key: str, resource: None) -> None:
        if key == "broken":
            raise failing.pop()

    def load(key: str) -> None:
        gevent.sleep(1)
        if key == "missing":
            raise LookupError

    processor: Processor[None] = Processor(
        load_resource=load,
        save_resource=save,
        min_duration=0,
        max_duration=50,
        max_attempts=1,
        batching=batching,
        name="trains",
    )
    with processor:
        for key, operation in [
            ("fine", nothing),
            ("fine", raising(KeyError())),
            ("missing", nothing),
            ("broken", nothing),  # unknown
            ("broken", nothing),  # a conflict
        ]:
            answer_of(processor.run, key, operation)
        if batching:
            gevent.spawn(answer_of, processor.run, "fine", nothing)
            leaving = gevent.spawn(answer_of, processor.run, "fine", nothing)
            gevent.sleep(0.5)
            leaving.kill()
    counted = {"returned": 1, "raised": 1, "failed": 2, "unknown": 1}
    assert outcomes(registry) == (counted | {"returned": 2, "withdrawn": 1} if batching else counted)
    assert value(registry, "failed_batches_total", phase="load", error="LoadFailed") == 1
    assert value(registry, "failed_batches_total", phase="save", error="SaveFailed") == 2
    assert value(registry, "conflicts_total") == 1


def test_what_was_undone_is_counted_with_what_it_took(clock: VirtualTime, registry: CollectorRegistry) -> None:
    def copy(resource: list[int]) -> list[int]:
        clock.spend(0.25)
        return list(resource)

    def add_and_raise(resource: list[int]) -> None:
        resource.append(1)
        raise KeyError

    with Processor(load_resource=lambda _: [0], min_duration=0, copy_resource=copy, name="trains") as processor:
        gevent.joinall([gevent.spawn(answer_of, processor.run, "k", add_and_raise) for _ in range(2)])
    assert value(registry, "undone_total") == 3  # the first one again when the batch was loaded again, and copied
    assert value(registry, "undo_seconds_total") == pytest.approx(0.75, abs=0.01)


def test_every_answer_is_counted_also_where_the_batch_never_began(
    clock: VirtualTime, registry: CollectorRegistry
) -> None:
    gate = gevent.event.Event()

    def load(key: str) -> None:
        gate.wait()
        raise OSError

    with Processor(load_resource=load, min_duration=0, max_duration=50, max_batch_size=2, name="trains") as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", nothing) for _ in range(7)]
        clock.settle()
        gate.set()
        gevent.joinall(callers)
        assert outcomes(registry) == {"failed": 7}
    assert value(registry, "batch_seconds_count") == 1


def test_refused_operations_and_those_whose_callers_left_are_counted_before_any_batch_ends(
    clock: VirtualTime, registry: CollectorRegistry
) -> None:
    with Processor(
        load_resource=sleeping(20), min_duration=0, max_duration=50, max_pending=2, name="trains"
    ) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", nothing) for _ in range(5)]
        clock.settle()
        assert [type(caller.value) for caller in callers[2:]] == [ProcessorOverloaded] * 3
        callers[0].kill()
        assert outcomes(registry) == {"withdrawn": 1, "refused": 3}
    assert outcomes(registry) == {"returned": 1, "withdrawn": 1, "refused": 3}


def test_an_operation_that_raised_and_whose_caller_left_is_counted_once(
    clock: VirtualTime, registry: CollectorRegistry
) -> None:
    with Processor(save_resource=sleeping(1), min_duration=0, max_duration=50, name="trains") as processor:
        operations = [nothing, raising(KeyError()), raising(KeyError())]
        callers = [gevent.spawn(answer_of, processor.run, "k", operation) for operation in operations]
        clock.advance(0.5)
        callers[0].kill()
        callers[1].kill()
    assert outcomes(registry) == {"raised": 1, "withdrawn": 2}


def test_threads_with_batching_off_are_counted_too(registry: CollectorRegistry) -> None:
    processor: Processor[None] = Processor(batching=False, name="trains")
    for _ in range(3):
        in_a_thread(processor.run, "k", nothing)
    assert outcomes(registry) == {"returned": 3}


# Gauges


def test_the_gauges_are_right_when_no_batch_ends_and_go_back_when_the_processor_stops(
    clock: VirtualTime, registry: CollectorRegistry
) -> None:
    with Processor(load_resource=sleeping(20), min_duration=0, max_duration=50, name="trains") as processor:
        callers = [gevent.spawn(processor.run, key, nothing) for key in "aab"]
        clock.advance(0.5)
        assert value(registry, "live_batches") == 2
        assert value(registry, "waiting_operations") == 3
        assert value(registry, "workers") == processor.stats().workers > 0
        gevent.joinall(callers, raise_error=True)
    for name in ("live_batches", "waiting_operations", "workers"):
        assert unrefreshed(registry, name) == 0


def test_without_a_scrape_a_timer_looks_once_a_second_and_ends_with_the_processors(
    clock: VirtualTime, registry: CollectorRegistry
) -> None:
    with Processor(load_resource=sleeping(20), min_duration=0, max_duration=50, name="trains") as processor:
        processor.run("k", nothing)
        caller = gevent.spawn(processor.run, "k", nothing)
        clock.advance(1.5)
        assert unrefreshed(registry, "waiting_operations") == 1
        caller.get()
    clock.advance(1)
    assert clock.timers == 0


def test_a_process_looks_from_its_first_run_on(
    clock: VirtualTime, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.here, "thread", None)
    monkeypatch.setattr(process.here, "hub", process._NO_HUB)
    with Processor(load_resource=sleeping(20), min_duration=0, max_duration=50, name="trains") as processor:
        caller = gevent.spawn(processor.run, "k", nothing)
        clock.advance(1.5)
        assert unrefreshed(registry, "waiting_operations") == 1
        caller.get()


def test_making_a_processor_starts_no_timer(clock: VirtualTime, registry: CollectorRegistry) -> None:
    Processor(name="trains")
    assert clock.timers == 0


def test_a_batch_whose_code_outlives_its_deadline_is_overdue_until_it_returns(
    clock: VirtualTime, registry: CollectorRegistry
) -> None:
    def stubborn(key: str) -> None:
        try:
            gevent.sleep(10)
        except gevent.Timeout:
            gevent.sleep(10)

    with Processor(load_resource=stubborn, min_duration=0, max_duration=2.5, name="trains") as processor:
        assert isinstance(answer_of(processor.run, "k", nothing), BatchTimeout)
        # The timer, where it runs, looked half a second ago.
        assert in_a_thread(value, registry, "overdue_batches") == 0  # there the batches may change while it looks
        assert value(registry, "overdue_batches") == 1
        assert in_a_thread(value, registry, "overdue_batches") == 1
    assert value(registry, "overdue_batches") == 0


def test_processors_of_one_name_are_summed_up(clock: VirtualTime, registry: CollectorRegistry) -> None:
    processors = [
        Processor(load_resource=sleeping(1), min_duration=0, max_duration=seconds, name="trains") for seconds in (9, 5)
    ]
    callers = [gevent.spawn(processor.run, "k", nothing) for processor in processors]
    clock.settle()
    assert value(registry, "waiting_operations") == 2
    assert value(registry, "max_duration_seconds") == 9
    gevent.joinall(callers, raise_error=True)
    assert outcomes(registry) == {"returned": 2}
    for processor in processors:
        processor.stop()


# watch


def test_processors_that_are_there_already_are_watched_and_a_second_call_changes_nothing() -> None:
    with Processor(min_duration=0, name="trains") as processor, watched(CollectorRegistry()) as registry:
        prometheus.watch(registry)
        assert value(registry, "operations_total", outcome="refused") == 0  # so that an increase of the first is seen
        processor.run("k", nothing)
        assert outcomes(registry) == {"returned": 1}


def test_a_metric_that_cannot_be_kept_is_logged_and_fails_no_batch(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Processor(min_duration=0, name="trains") as processor:
        monkeypatch.setattr(prometheus._Series, "add_batch", raising(OSError("disk full")))
        processor.run("k", nothing)
        gevent.sleep(0)
        gevent.sleep(0)
    assert "raised as a watcher; no batch is affected" in caplog.text


def test_a_look_that_fails_is_logged_once_and_tried_again_when_a_batch_ends(
    clock: VirtualTime,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Processor(min_duration=0, name="trains") as processor:
        with monkeypatch.context() as broken:
            broken.setattr(prometheus._Series, "set_gauges", raising(OSError("disk full")))
            processor.run("k", nothing)
            clock.advance(5)
        assert caplog.text.count("OSError: disk full") == 1
        processor.run("k", nothing)
        clock.advance(1)
        assert unrefreshed(registry, "max_duration_seconds") == 1


def test_a_child_adds_what_it_does_itself() -> None:
    program = """
from gevent import monkey; monkey.patch_all()
import os, sys
from prometheus_client import REGISTRY
from geventbatch import Processor
from geventbatch.integrations import prometheus
prometheus.watch()
processor = Processor(min_duration=0, name="trains")
run = lambda: processor.run("k", lambda resource: None)
count = lambda: REGISTRY.get_sample_value(
    "geventbatch_operations_total", {"processor": "trains", "outcome": "returned"}
)
for _ in range(3): run()
before = count()
if os.fork():
    sys.exit(os.wait()[1])
(export,) = prometheus._exports.values()
assert export._timer is None
import warnings; warnings.simplefilter("ignore")  # it was forked from one that had run batches
run(); run()
print(before, count())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3.0 5.0\n", "")


def test_without_the_extra_the_import_says_what_to_install() -> None:
    program = "import sys; sys.modules['prometheus_client'] = None; import geventbatch.integrations.prometheus"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: geventbatch.integrations.prometheus needs prometheus_client: "
        "pip install 'geventbatch[prometheus]'"
    )


# Several processes


class Server:
    """gunicorn with `tests.support.programs.prometheus_app`."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        (directory / "metrics").mkdir(parents=True)
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "--config", str(CONFIGURATION), *arguments],
                cwd=ROOT,
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory / "metrics")},
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self._port = int(self.process.stdout.readline() or 0)

    def ask(self, path: str) -> str:
        for left in range(10, -1, -1):
            try:
                with urlopen(f"http://127.0.0.1:{self._port}/{path}") as answer:
                    return str(answer.read().decode())
            except HTTPError:  # findings/prometheus-client-scrape-meets-an-empty-file.sh
                if path != "metrics" or not left or "buffer of at least" not in self.log():
                    raise
        raise AssertionError

    def scraped(self) -> dict[str, float]:
        """What is there of each outcome and gauge, and of the batches."""
        found = {}
        for family in text_string_to_metric_families(self.ask("metrics")):
            for sample in family.samples:
                if sample.labels.get("processor") == "trains" and "le" not in sample.labels:
                    name = sample.labels.get("outcome") or sample.name.removeprefix("geventbatch_")
                    found[name] = sample.value
        return found

    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def gunicorn(directory: Path, *arguments: str) -> Iterator[Server]:
    server = Server(directory, *arguments)
    try:
        yield server
    except BaseException as error:
        error.add_note(server.log())
        raise
    finally:
        server.end()


MARKED = """
from gevent import monkey; monkey.patch_all()
import os, warnings
from prometheus_client import multiprocess
from geventbatch import Processor, check_setup
from geventbatch.integrations import prometheus
from tests.support.children import wait_for

def worker():
    pid = os.fork()
    if not pid:
        processor.run("k", lambda resource: None)
        print([problem.name for problem in check_setup()], flush=True)
        os._exit(0)
    wait_for(pid)
    return pid

prometheus.watch()
processor = Processor(min_duration=0)
first = worker()
worker()
(problem,) = check_setup()
named = "gauges of 2 processes" in problem.what and str(first) in problem.what
print(problem.name, named, "child_exit" in problem.mend)
for file in os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"]):
    multiprocess.mark_process_dead(file.rpartition("_")[2].partition(".")[0])
print(check_setup())
"""


def test_gauges_of_processes_that_have_ended_are_a_problem_until_these_are_marked_dead(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", MARKED],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.stdout.splitlines() == ["[]", "['prometheus-dead']", "prometheus-dead True True", "[]"], ran.stderr
    assert "gauges of 1 processes" in ran.stderr  # the second worker warned of the first one's


UNBATCHED = """
from gevent import monkey; monkey.patch_all()
import gevent
from gevent.event import Event
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from geventbatch import Processor
from geventbatch.integrations import prometheus

def gauges():
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    names = ["waiting_operations", "live_batches", "max_duration_seconds"]
    return [registry.get_sample_value(f"geventbatch_{name}", {"processor": "trains"}) for name in names]

def become(*expected):
    with gevent.Timeout(2):
        while gauges() != list(expected):
            gevent.sleep(0.02)

prometheus.watch()
gate = Event()
with Processor(min_duration=0, max_duration=7, batching=False, name="trains") as processor:
    processor.run("k", lambda resource: None)
    callers = [gevent.spawn(processor.run, "k", lambda resource: gate.wait()) for _ in range(3)]
    become(3, 3, 7)
    gate.set()
    gevent.joinall(callers, raise_error=True)
    become(0, 0, 7)
become(0, 0, 0)
"""

UNPATCHED = """
import threading
from gevent._hub_local import get_hub_if_exists
from geventbatch import Processor
from geventbatch.integrations import prometheus

def run():
    processor.run("k", lambda resource: None)
    (export,) = prometheus._exports.values()
    print(export._timer, get_hub_if_exists())

prometheus.watch()
processor = Processor(min_duration=0, batching=False)
run()
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(("program", "told"), [(UNBATCHED, ""), (UNPATCHED, "None None\n" * 2)], ids=["patched", "not"])
def test_a_process_that_is_unbatched_from_its_start_looks_too_where_a_timer_rings(
    tmp_path: Path, program: str, told: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, told, "")


def test_the_sums_over_all_workers_are_what_the_clients_were_answered(tmp_path: Path) -> None:
    side_by_side(
        check_sums,
        (tmp_path / "preloaded", "--preload"),
        (tmp_path / "loaded late",),
    )


def check_sums(directory: Path, *arguments: str) -> None:
    with gunicorn(directory, *arguments) as server:
        answers: list[str] = []

        def both_have_answered() -> bool:
            keys = [*"abc" * 10, *["raise"] * 4, *["broken"] * 3]
            callers = [gevent.spawn(server.ask, key) for key in keys]
            answers.extend(caller.get() for caller in callers)
            return len({answer for answer in answers if answer.isdigit()}) == 2

        wait_until(both_have_answered)
        expected = {
            "returned": sum(answer.isdigit() for answer in answers),
            "raised": answers.count("KeyError"),
            "unknown": answers.count("SaveFailed"),
        }
        assert sum(expected.values()) == len(answers)
        for found in [server.scraped() for _ in range(6)]:  # whichever worker it is that is asked
            assert {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]} == expected
            assert found["batch_operations_sum"] == len(answers)

        check_the_end_of_workers(server)


def check_the_end_of_workers(server: Server) -> None:
    before = server.scraped()
    hanging = gevent.spawn(answer_of, server.ask, "hang")
    wait_until(lambda: (now := server.scraped())["waiting_operations"] == now["live_batches"] == 1)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert isinstance(hanging.get(), OSError)
    wait_until(lambda: server.log().count("Booting worker") == 4)

    after = server.scraped()
    assert after["waiting_operations"] == after["live_batches"] == after["workers"] == 0
    for name in (*OUTCOMES, "batch_seconds_count", "batch_operations_sum"):
        assert after[name] == before[name]


# What is drawn, and what wakes somebody


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def exported() -> dict[str, set[str]]:
    """The names of all that is shown once every kind of thing has happened, each with its labels."""
    with (
        watched(CollectorRegistry()) as registry,
        Processor(load_resource=raising(OSError()), min_duration=0) as processor,
    ):
        answer_of(processor.run, "k", nothing)
        shown: dict[str, set[str]] = {}
        for sample in (sample for family in registry.collect() for sample in family.samples):
            shown.setdefault(sample.name, set()).update(sample.labels)
        return shown


@pytest.mark.parametrize("expressions", [dashboard_expressions, alert_expressions])
def test_every_metric_and_label_in_the_dashboard_and_the_alerts_is_exported(
    expressions: Callable[[], list[str]],
) -> None:
    shown = exported()
    for expression in expressions():
        names = re.findall(r"geventbatch_\w+", expression)
        assert names
        assert shown.keys() >= set(names), expression
        known = set.union(*(shown[name] for name in names)) | {"job"}  # which Prometheus adds
        matched = re.findall(r"(\w+) *(?:=~|!=|!~|=)\"", expression)
        grouped = [label.strip() for labels in re.findall(r"by \((.*?)\)", expression) for label in labels.split(",")]
        assert known >= {*matched, *grouped}, expression


def test_every_outcome_that_is_asked_for_is_one() -> None:
    for expression in dashboard_expressions() + alert_expressions():
        assert set(re.findall(r'outcome="(\w+)"', expression)) <= set(OUTCOMES)


def test_the_panels_of_the_dashboard_overlap_nowhere() -> None:
    taken = [
        (x, y)
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) == 23


def test_there_are_five_alerts_and_the_guide_names_each() -> None:
    names = re.findall(r"alert: (\w+)", ALERTS.read_text())
    guide = (ROOT / "docs/watching.md").read_text()
    assert len(names) == 5
    assert [name for name in names if f"`{name}`" not in guide] == []


def test_every_metric_is_in_the_guide() -> None:
    guide = (ROOT / "docs/watching.md").read_text()
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported()}
    assert [name for name in sorted(families) if name.removesuffix("_total") not in guide] == []


@pytest.mark.promtool
def test_each_alert_comes_when_it_should_and_not_when_all_is_well() -> None:
    for arguments in (["check", "rules", str(ALERTS)], ["test", "rules", "tests/support/programs/alerts_test.yml"]):
        done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
