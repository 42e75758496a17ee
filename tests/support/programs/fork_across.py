"""A process that forks while an operation across keys is saved and others wait. Says what parent and child are told."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import gevent

from geventbatch import Processor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

PARENT = os.getpid()
inside = gevent.event.Event()
kept: dict[str, list[int]] = {}


def say(*words: object) -> None:
    sys.stdout.write(f"{'parent' if os.getpid() == PARENT else 'child'} {' '.join(map(str, words))}\n")
    sys.stdout.flush()


class Accounts:
    all_or_nothing = True

    @contextmanager
    def __call__(self, keys: list[str]) -> Iterator[dict[str, list[int]]]:
        accounts = {key: list(kept.get(key, ())) for key in keys}
        yield accounts
        say("saves", *sorted(accounts))
        inside.set()
        gevent.sleep(0.3)
        kept.update(accounts)


class Store:
    open_resources = Accounts()

    def __call__(self, key: str) -> AbstractContextManager[list[int]]:
        raise AssertionError(key)


def put(accounts: tuple[list[int], ...], mark: int) -> int:
    for account in accounts:
        account.append(mark)
    return mark


processor: Processor[list[int]]
if sys.argv[1:] == ["one key too"]:
    processor = Processor(open_resource=Store(), min_duration=0)
else:
    processor = Processor(open_resources=Accounts(), min_duration=0)


def run(keys: str, mark: int) -> None:
    say("answers", processor.run_across([*keys], put, mark))


callers = [gevent.spawn(run, "ab", 1)]
inside.wait()
callers += [gevent.spawn(run, "bc", 2), gevent.spawn(run, "ca", 3)]
gevent.sleep(0.05)
child = os.fork()
if child == 0:
    run("abc", 4)
    say("stops", processor.stop(5), processor.stats().batches)
    gevent.sleep(0.5)  # longer than a save: what would go on here of the parent's has gone on by then
    say("ends")
    os._exit(0)
os.waitpid(child, 0)
gevent.joinall(callers)
say("stops", processor.stop(5), kept)
