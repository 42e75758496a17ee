"""`check_setup`: finds what in this process would block the hub, not outlive a fork, or lose changes.

The first two are looked for at the first `run`, too.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gevent import monkey

from geventbatch._core import process
from geventbatch._watch import setup_problems
from geventbatch._watch.problem import SetupProblem, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def check_setup() -> list[SetupProblem]:
    """Look for what would block the hub, not outlive a fork, or lose changes: for a health endpoint, or a test.

    It looks at the modules that are imported by now and at the processors that exist, so call it after the application
    is imported. The first `run` of a process warns once of the process's problems. A processor that is made warns of
    changes that it would lose. sqlite3 is not named: it blocks while it waits for a lock on its file, and nothing mends
    that.

    Returns:
        The problems; none when all is well.
    Switches: no.
    """
    process.notice_fork()
    return [*_of_process(), *_small_pools(), *setup_problems.problems()]


def _of_process() -> list[SetupProblem]:
    return [problem for look in looks for problem in look()]


def _small_pools() -> Iterator[SetupProblem]:
    size_of: Any = getattr(sys.modules.get("geventbatch.stores.sql._connections"), "size_of", None)
    if size_of is None:
        return
    for one in setup_problems.live():
        options = one._options  # noqa: SLF001 - nothing else needs them outside of it
        size, most = size_of(options.open_resource), options.max_batches
        if size is not None and most is not None and size < most:
            yield SetupProblem(
                "pool-small",
                f"The processor {options.name} has a max_batches of {most}, but the pool of its SQLStore has {size} "
                "connections: the other batches wait for one, while their max_duration runs.",
                "Make the pool as large as max_batches, plus what other code takes from it; or lower max_batches.",
            )


_PATCHED: Final = ("socket", "threading")


class _Patched:
    """When gevent has patched."""

    def __init__(self) -> None:
        self.first = monkey.is_module_patched("socket")
        """True if that was before geventbatch was imported; an integration that patches itself says so here."""


patched: Final = _Patched()


def _is_patched() -> bool:
    return all(map(monkey.is_module_patched, _PATCHED))


def _unpatched() -> Iterator[SetupProblem]:
    names = [name for name in _PATCHED if not monkey.is_module_patched(name)]
    if names:
        yield SetupProblem(
            "unpatched",
            f"geventbatch runs in a process whose {' and '.join(names)} gevent has not patched: a load, a save or a "
            "lock that waits will block every greenlet.",
            "Call gevent.monkey.patch_all() before anything else is imported.",
        )
    elif not patched.first:
        yield SetupProblem(
            "patched-late",
            "gevent patched this process after geventbatch was imported: what was made or imported by name before, "
            "such as a module's threading.Lock, is still the one that blocks every greenlet.",
            "Call gevent.monkey.patch_all() first of all; under uWSGI gevent-early-monkey-patch = true in place of "
            "gevent-monkey-patch.",
        )


def _fork() -> Iterator[SetupProblem]:
    if _is_patched() and not monkey.is_module_patched("os"):
        yield SetupProblem(
            "fork-unpatched",
            "gevent has patched this process, but not os.fork: a child would share its parent's event loop.",
            "Call gevent.monkey.patch_all() without os=False.",
        )
    inherited: list[str] = getattr(sys.modules.get("geventbatch.stores.sqlalchemy._engines"), "inherited", list)()
    inherited += getattr(sys.modules.get("geventbatch.stores.django._connections"), "inherited", list)()
    if inherited:
        yield SetupProblem(
            "forked-connections",
            f"The process that this one was forked from had used {', '.join(inherited)}: its connections are here too. "
            "Stores have put them aside, but other code that used them before a store did has shared them.",
            "Close them before the fork: engine.dispose(), django.db.connections.close_all(); or put them aside in the "
            "child, first of all: engine.dispose(close=False).",
        )
    of_sql = sys.modules.get("geventbatch.stores.sql._connections")
    refused: list[str] = getattr(of_sql, "refused", list)()
    if refused:
        mend: str = getattr(of_sql, "MEND", "")
        yield SetupProblem(
            "forked-pool",
            f"{', '.join(refused)} had connections when this process was forked, which are its parent's: every batch "
            "of an SQLStore over it fails here.",
            f"{mend[:1].upper()}{mend[1:]}.",
        )
    if process.here.forked_late:
        yield SetupProblem(
            "forked-late",
            "This process was forked from one that had run batches already: it shares what that one had opened, "
            "connections to a database among it.",
            "Run nothing before the fork (gunicorn: not while the application is preloaded), or close it all in the "
            "parent first: engine.dispose(), django.db.connections.close_all().",
        )


def psycopg() -> Iterator[SetupProblem]:
    """Find out whether psycopg 3 is used, and waits in C."""
    waiting: Any = sys.modules.get("psycopg.waiting")
    waits_in_c = waiting is not None and waiting.wait is getattr(waiting, "wait_c", None)
    if waits_in_c and _is_patched() and _is_psycopg_used():
        yield SetupProblem(
            "psycopg",
            "psycopg waits in C, so that a statement blocks every greenlet: it was imported before gevent patched.",
            "Call gevent.monkey.patch_all() first of all; do not set PSYCOPG_WAIT_FUNC=wait_c.",
        )


def _is_psycopg_used() -> bool:
    """Return whether a store, Django, SQLAlchemy or other code of the process uses psycopg 3. Libraries import it too.

    (A connection that a load opens and closes is seen during that load only.)
    """
    if "psycopg" in _drivers_of_stores():
        return True
    django: Any = sys.modules.get("django.db.backends.postgresql.base")
    if django is not None and django.Database.__name__ == "psycopg":
        return True
    names = (("psycopg", "Connection"), ("psycopg_pool", "ConnectionPool"))
    its = tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
    engine = getattr(sys.modules.get("sqlalchemy"), "Engine", ())
    return any(
        issubclass(type(one), its) or (issubclass(type(one), engine) and one.dialect.driver == "psycopg")
        for one in gc.get_objects()
    )


def _drivers_of_stores() -> set[str]:
    used: set[str] = getattr(sys.modules.get("geventbatch.stores.sqlalchemy._engines"), "drivers", set)()
    return used


def psycopg2() -> Iterator[SetupProblem]:
    """Find out whether psycopg2 waits in C, as it does by default."""
    extensions: Any = sys.modules.get("psycopg2.extensions")
    # Libraries use the newer one, where there are both.
    if not _is_patched() or ("psycopg" in sys.modules and "psycopg2" not in _drivers_of_stores()):
        return
    if extensions is not None and extensions.get_wait_callback() is None:
        yield SetupProblem(
            "psycopg2",
            "psycopg2 waits in C, so that a statement blocks every greenlet.",
            "Use psycopg 3, or call psycogreen.gevent.patch_psycopg() after patching.",
        )


def _pooler() -> Iterator[SetupProblem]:
    pooled: list[str] = getattr(sys.modules.get("geventbatch.stores.sqlalchemy._engines"), "pooled", list)()
    if pooled:
        yield SetupProblem(
            "pooler",
            f"Behind {', '.join(pooled)} is a pooler, and statements have failed since the driver had prepared them in "
            "another session. The batches of a store prepare nothing there; other code that uses the engine does.",
            'Pass connect_args={"prepare_threshold": None} to create_engine; or set max_prepared_statements in '
            "PgBouncer (from 1.21 on).",
        )


def _mysql() -> Iterator[SetupProblem]:
    if "MySQLdb._mysql" in sys.modules:  # PyMySQL, which may stand in for MySQLdb, has no such module
        yield SetupProblem(
            "mysqlclient",
            "mysqlclient (MySQLdb) waits in C, so that a statement blocks every greenlet.",
            "Use PyMySQL: pymysql.install_as_MySQLdb() before anything imports MySQLdb.",
        )
    extension: Any = sys.modules.get("mysql.connector.connection_cext")  # imported even if it is not used
    blocks = getattr(extension, "CMySQLConnection", None)
    if blocks is None:
        return
    going: list[str] = getattr(sys.modules.get("geventbatch.stores.django._connections"), "by_extension", list)()
    does = f"is to connect to {', '.join(going)}" if going else "has connected"
    if going or any(issubclass(type(one), blocks) for one in gc.get_objects()):
        yield SetupProblem(
            "mysql-connector",
            f"mysql-connector-python {does} by its C extension, whose statements block every greenlet.",
            "Connect with use_pure=True.",
        )


def _huey() -> Iterator[SetupProblem]:
    if Path(sys.argv[0] if sys.argv else "").stem == "huey_consumer":
        yield SetupProblem(
            "huey_consumer",
            "huey_consumer drops the running tasks at SIGTERM, and it is patched too late, not at all, or no more "
            "after a SIGHUP.",
            "Run a script that patches first and then calls geventbatch.integrations.huey.consume(huey).",
        )


looks: Final[list[Callable[[], Iterator[SetupProblem]]]] = [
    _unpatched,
    _fork,
    psycopg,
    psycopg2,
    _pooler,
    _mysql,
    _huey,
]
"""What looks at the process. An integration adds what only it can know of."""


def _warn() -> None:
    for problem in _of_process():
        warn(problem)


process.at_first_run(_warn)
