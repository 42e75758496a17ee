"""Messages of several statements through psycopg 3, sent and waited for without its cursors.

A cursor prepares, adapts and describes, and psycopg waits with a poll of its own: together more than twice what the
message costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gevent import get_hub, monkey
from psycopg import generators, pq
from psycopg.errors import InternalError, error_from_result

if TYPE_CHECKING:
    import psycopg
    from psycopg.pq.abc import PGresult

_WITH_HUB: Final = monkey.is_module_patched("select")
"""psycopg waits in the hub, too."""

_GOOD: Final = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK, pq.ExecStatus.EMPTY_QUERY})


def exchange(driver: psycopg.Connection[Any], message: bytes) -> list[PGresult]:
    """Send *message*, and return the results of its statements. Raises psycopg's error of one. Switches: yes."""
    pgconn = driver.pgconn
    pgconn.send_query(message)
    results = _awaited(driver, pgconn.socket)
    for result in results:
        if result.status not in _GOOD:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise error_from_result(result, encoding=driver.info.encoding)
            raise InternalError(f"unexpected result: {pq.ExecStatus(result.status).name}")
    return results


def _awaited(driver: psycopg.Connection[Any], socket: int) -> list[PGresult]:
    answers: Any = generators.execute(driver.pgconn)
    if not _WITH_HUB:
        found: list[PGresult] = driver.wait(answers)
        return found
    hub = get_hub()
    try:
        awaited = next(answers)
        while True:
            watcher = hub.loop.io(socket, int(awaited))  # psycopg's numbers are libev's
            try:
                hub.wait(watcher)
            finally:
                watcher.close()
            awaited = answers.send(awaited)  # if it is ready for one of two, the other does nothing
    except StopIteration as ended:
        results: list[PGresult] = ended.value
        return results
