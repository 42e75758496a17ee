from gevent import monkey

# First of all, because a module that is imported before has bound the blocking functions already.
monkey.patch_all()

import gc  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from weakref import WeakSet  # noqa: E402

import gevent  # noqa: E402
import pytest  # noqa: E402
from gevent.hub import Hub  # noqa: E402
from greenlet import greenlet  # noqa: E402

from geventbatch._core import process  # noqa: E402
from geventbatch._watch import log, setup_problems  # noqa: E402
from geventbatch.testing import VirtualTime, virtual_time  # noqa: E402
from tests.support.servers import end_postgres  # noqa: E402
from tests.support.shared import environment  # noqa: E402

# pytest-timeout raises in whichever greenlet runs when the time is up. What is named here the hub raises in the main
# greenlet as well; otherwise a test whose other greenlets spin goes on, or even passes, when one of them "failed".
Hub.SYSTEM_ERROR = (*Hub.SYSTEM_ERROR, pytest.fail.Exception)

os.environ.update(environment())

# A shell has its background jobs ignore signals, and nohup too; servers that tests start would inherit it.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)

_greenlets: WeakSet[greenlet] = WeakSet()
"""Those that were met so far: what is frozen is not met again."""


def pytest_report_header(config: pytest.Config) -> str | None:
    if (
        config.getoption("markexpr")
        == "not browser and not chaos and not mariadb and not memcached and not pgbouncer and not promtool "
        "and not site and not variants"
    ):
        return (
            "left out: the page in Chromium (-m browser), broken servers (-m chaos), stores on MariaDB (-m mariadb), "
            "one in memcached (-m memcached), behind PgBouncer (-m pgbouncer), alerts (-m promtool), "
            "the site (-m site), more forms of all (-m variants)"
        )
    return None


def pytest_unconfigure() -> None:
    end_postgres()


def pytest_collection_finish() -> None:
    _freeze()  # or else the first test pays for it


@pytest.fixture(autouse=True)
def _nothing_was_told_before() -> None:
    log._logged_at.clear()
    setup_problems._workers.seen = 0


@pytest.fixture(autouse=True)
def _no_greenlet_is_left() -> Iterator[None]:
    before = set(_freeze())
    yield
    left = [one for one in _live_greenlets() if one not in before]
    for _ in range(10):
        if not left:
            return
        gevent.sleep(0)
        left = [one for one in left if _is_live(one)]
    stacks = "\n".join(f"{one!r}\n{_stack(one)}" for one in left)
    for one in left:
        gevent.kill(one)
    gevent.sleep(0)
    pytest.fail(f"the test left {len(left)} greenlets behind:\n{stacks}", pytrace=False)


@pytest.fixture
def clock() -> Iterator[VirtualTime]:
    with virtual_time() as clock:
        yield clock


@pytest.fixture
def no_other_processors() -> Iterator[None]:
    """What watches all processors sees those of this test: others live as long as somebody holds them."""
    others = list(process.made)
    kept = [held() for held in others]
    process.made.clear()
    yield
    process.made[:0] = others
    del kept


def _freeze() -> list[greenlet]:
    """Give the live greenlets, and leave what exists now out of `gc.get_objects`, which is quick then."""
    gc.collect()
    live = _live_greenlets()
    gc.freeze()
    return live


def _live_greenlets() -> list[greenlet]:
    # The type is asked, not isinstance(), which would wake proxies such as Flask's by reading their __class__.
    _greenlets.update(one for one in gc.get_objects() if issubclass(type(one), greenlet))
    return [one for one in _greenlets if _is_live(one)]


def _is_live(one: greenlet) -> bool:
    """Say whether it is started or scheduled, has not ended, and is no part of gevent's machinery.

    A greenlet without a parent is the main one of some thread.
    """
    if isinstance(one, Hub) or type(one).__module__ == "gevent.threadpool" or one.parent is None:
        return False
    return bool(one) and not one.dead


def _stack(one: greenlet) -> str:
    return "".join(traceback.format_stack(one.gr_frame)) if one.gr_frame else "  not yet running\n"
