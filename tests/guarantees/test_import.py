"""What importing costs and changes, and the two warnings that come once."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import geventbatch
from geventbatch import Processor, stores
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(python("-m", "tests.support.programs.import_only").stdout)
    return told


def test_importing_brings_in_little_beyond_gevent_and_nothing_that_is_slow(imported: dict[str, Any]) -> None:
    ours = [name for name in imported["new"] if name.split(".")[0] == "geventbatch"]
    others = {name.split(".")[0] for name in imported["new"]} - {"geventbatch", "geventbatch__mypyc"}
    assert ours
    assert others <= set(sys.stdlib_module_names)
    assert not others & {
        "asyncio",
        "concurrent",
        "ctypes",
        "email",
        "http",
        "json",
        "logging",
        "sqlite3",
        "unittest",
        "urllib",
    }
    assert len(others) < 40


def test_importing_does_not_bring_in_what_only_tests_or_other_libraries_need(imported: dict[str, Any]) -> None:
    assert "geventbatch.testing" not in imported["new"]


def test_importing_patches_nothing(imported: dict[str, Any]) -> None:
    assert imported["changed"] == []
    assert imported["patched"] == []
    assert imported["saved"] == []


def test_importing_makes_no_hub_and_starts_no_thread(imported: dict[str, Any]) -> None:
    assert imported["hub"] == "None"
    assert imported["threads"] == 1


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in geventbatch.__all__:
        assert getattr(geventbatch, name).__doc__
    assert sorted(geventbatch.__all__) == [
        "Batch",
        "BatchAborted",
        "BatchError",
        "BatchMetric",
        "BatchTimeout",
        "COMPILED",
        "Conflict",
        "IdempotencyKeyReused",
        "LiveBatch",
        "LoadFailed",
        "MetricSubscription",
        "NotSaved",
        "NothingToSave",
        "OperationCancelled",
        "PartlySaved",
        "Processor",
        "ProcessorOverloaded",
        "ProcessorStats",
        "ProcessorStopped",
        "Rejected",
        "Repeated",
        "ResourceMissing",
        "SaveFailed",
        "SetupProblem",
        "check_setup",
        "current_batch",
        "stop_all",
        "worker_number_for_key",
    ]


# The unpatched process

RUN_TWICE = """
import warnings
{patch}
from geventbatch import Processor, stores

def nothing(resource):
    pass

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for number in range(2):
        with Processor(min_duration=0, batching={batching}) as processor:
            for _ in range(2):
                processor.run("k", nothing)  # here
for warning in caught:
    print(warning.category.__name__, warning.lineno, warning.message)
"""


def warned(patch: str, *, batching: bool = True) -> list[str]:
    return python("-c", RUN_TWICE.format(patch=patch, batching=batching)).stdout.splitlines()


@pytest.mark.parametrize(
    ("patch", "names"),
    [
        ("", "socket and threading"),
        ("from gevent import monkey; monkey.patch_socket()", "threading"),
        ("from gevent import monkey; monkey.patch_all(socket=False)", "socket"),
    ],
)
def test_in_a_process_that_is_not_patched_the_first_run_warns_once_and_names_what_is_not(
    patch: str, names: str
) -> None:
    (warning,) = warned(patch)
    line = RUN_TWICE.splitlines().index('                processor.run("k", nothing)  # here') + 1
    assert warning == (
        f"RuntimeWarning {line} geventbatch runs in a process whose {names} gevent has not patched: a load, a save or "
        "a lock that waits will block every greenlet. Call gevent.monkey.patch_all() before anything else is imported."
    )


def test_in_a_patched_process_and_with_batching_off_nobody_is_warned() -> None:
    assert warned("from gevent import monkey; monkey.patch_all()") == []
    assert warned("", batching=False) == []


# Immutable resources


@pytest.mark.parametrize("resource", [5, "text", (1, 2), 1.5, b"bytes", True, frozenset(), 1j], ids=repr)
def test_a_load_resource_that_gives_an_immutable_builtin_warns_once(clock: VirtualTime, resource: object) -> None:
    with (
        warnings.catch_warnings(record=True) as caught,
        Processor(load_resource=lambda key: resource, min_duration=0) as processor,
    ):
        warnings.simplefilter("always")
        for key in "aab":
            processor.run(key, lambda resource: None)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert str(warning.message) == (
        f"load_resource returned {resource!r}, a {type(resource).__name__}, which no operation can change, so "
        "nothing can be saved in it: let it return an object, a dict or a list that operations change in place"
    )


@pytest.mark.parametrize("batching", [True, False])
def test_it_warns_with_batching_off_too_and_runs_all_the_same(clock: VirtualTime, batching: bool) -> None:
    with Processor(load_resource=lambda key: 5, min_duration=0, batching=batching) as processor:
        with pytest.warns(RuntimeWarning, match="load_resource returned 5, a int"):
            assert processor.run("k", lambda resource: resource + 1) == 6
        assert processor.run("k", lambda resource: resource + 1) == 6


def test_where_warnings_are_errors_it_is_a_failed_load_once(clock: VirtualTime) -> None:
    with Processor(load_resource=lambda key: 5, min_duration=0) as processor:
        failed = answer_of(processor.run, "k", lambda resource: resource)
        assert isinstance(failed, geventbatch.LoadFailed)
        assert isinstance(failed.__cause__, RuntimeWarning)
        assert processor.run("k", lambda resource: resource) == 5


@pytest.mark.parametrize("resource", [None, [], {}, object(), bytearray(), set()], ids=repr)
def test_other_resources_warn_nobody(clock: VirtualTime, resource: object) -> None:
    with Processor(load_resource=lambda key: resource, min_duration=0) as processor:
        assert processor.run("k", lambda loaded: loaded is resource) is True


def test_a_subclass_of_an_immutable_builtin_can_have_state_and_warns_nobody(clock: VirtualTime) -> None:
    class Account(int):
        limit = 0

    def raise_limit(account: Account) -> None:
        account.limit = 5

    with Processor(load_resource=lambda key: Account(7), min_duration=0) as processor:
        assert processor.run("k", raise_limit) is None


# Stores


@pytest.mark.parametrize(
    ("store", "vendor"), [("DjangoStore", "django"), ("RedisStore", "redis"), ("SQLAlchemyStore", "sqlalchemy")]
)
def test_a_store_without_its_vendor_says_what_to_install_and_the_others_work(store: str, vendor: str) -> None:
    program = f"""
import sys
sys.modules[{vendor!r}] = None  # as if it were not installed
from geventbatch import stores
for name in stores.__all__:
    try:
        getattr(stores, name)
    except ImportError as error:
        print(name, error)
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=50
    ).stdout
    assert told == f"{store} {store} needs {vendor}: pip install 'geventbatch[{vendor}]'\n"


def test_a_store_that_there_is_none_of_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="MongoStore"):
        stores.MongoStore  # type: ignore[attr-defined]  # noqa: B018 - checkers know that too
