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
from typing import Any

from geventbatch.testing._store_trial import Trial


def main() -> None:
    """Read a bench, then keys and how often to add 1 at each; answer each line with the errors."""
    _import(*sys.argv[1:])
    bench = _read(sys.stdin.readline())
    with Trial(bench, "two processes lose nothing") as trial:
        processor = trial.processor(max_attempts=200)
        _say([])
        for line in sys.stdin:
            _say(trial.add_all(processor, *_read(line)))


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
