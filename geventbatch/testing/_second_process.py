"""The second process of `store_contract`: it opens the store of a bench, and adds where the first one tells it to."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import base64
import json
import pickle
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING, Any

from geventbatch.testing._store_trial import Trial

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch._processor import Processor


def main() -> None:
    """Read a bench, then keys and how often to add 1 at each; answer each line with the errors."""
    _import(*sys.argv[1:])
    bench = _read(sys.stdin.readline())
    with Trial(bench, "two processes lose nothing") as trial:
        processor = trial.processor(max_attempts=200)
        _say([])
        for line in sys.stdin:
            keys, times = _read(line)
            _say(add_all(trial, processor, keys, times))


def add_all(trial: Trial, processor: Processor[Any], keys: list[Hashable], times: int) -> list[str]:
    """Add 1 at each of *keys*, so many *times*, all keys at once; return the errors."""
    answers = [trial.run_all([(processor, key, trial.bench.add, 1) for key in keys]) for _ in range(times)]
    return [repr(answer) for some in answers for answer in some if isinstance(answer, BaseException)]


def _import(name: str, file: str) -> None:
    """Import the module of the bench, which pytest may have found in a way of its own."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        spec = spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _read(line: str) -> Any:
    return pickle.loads(base64.b64decode(line))  # noqa: S301 - our own parent has written it


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
