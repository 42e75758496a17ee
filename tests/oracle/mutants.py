"""Stores that are broken on purpose: the oracle has to find each.

    python -m tests.oracle.mutants "forgotten rows" program.py

runs a program with one of them; with "" it runs it as it is.
"""

from gevent import monkey

monkey.patch_all()

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from geventbatch._batch import Batch


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Break the library so, until the block is left."""
    owner, attribute, broken = MUTANTS[name]
    whole = owner.__dict__[attribute]
    setattr(owner, attribute, broken(whole))
    try:
        yield
    finally:
        setattr(owner, attribute, whole)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "forgotten rows": (Batch, "rows", lambda _: property(lambda _: [])),
}


if __name__ == "__main__":
    _, mutant, program = sys.argv
    if mutant:
        with mutated(mutant):
            runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_path(program, run_name="__main__")
