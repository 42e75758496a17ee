"""``python -m geventbatch [MODULE]`` says which form runs, with which versions, and what `check_setup` finds in MODULE.

It patches first and then imports MODULE, which is the application as gunicorn's gevent worker would import it
(``shop.wsgi`` or ``shop.wsgi:app``). The status is 0, or 1 if `check_setup` has found something, or 2 if MODULE cannot
be imported. Paste what it prints into a report of a defect.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import textwrap
import traceback
from importlib import metadata
from pathlib import Path
from typing import Final

import gevent
from gevent import monkey

import geventbatch
from geventbatch._watch import setup_check

WIDTH: Final = 110
"""Characters of a line."""

NAMES: Final = {
    "stores": ("SQLAlchemy", "Flask-SQLAlchemy", "Django", "redis"),
    "drivers": (
        "psycopg",
        "psycopg-binary",
        "psycopg-c",
        "psycopg-pool",
        "psycopg2",
        "psycopg2-binary",
        "psycogreen",
        "pg8000",
        "PyMySQL",
        "mysql-connector-python",
        "mysqlclient",
    ),
    "servers": ("gunicorn", "uWSGI", "pyuwsgi"),
    "queues": ("celery", "dramatiq", "huey"),
    "others": ("Flask", "prometheus-client", "opentelemetry-api"),
}
"""The distributions that matter to us, by what they are for."""

TO_COMPILE: Final = (
    "The compiled form takes less CPU time. There are wheels for Linux and macOS; elsewhere, with a C compiler and the "
    "headers of Python: pip install --force-reinstall --no-deps --no-cache-dir --no-binary "
    "geventbatch geventbatch"
)


def _line(title: str, said: str) -> None:
    print(textwrap.fill(said, WIDTH, initial_indent=f"{title:<13}", subsequent_indent=" " * 13, break_on_hyphens=False))


def _installed(names: tuple[str, ...]) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _describe() -> None:
    form = "compiled" if geventbatch.COMPILED else "pure Python"
    _line("geventbatch", f"{geventbatch.__version__}, {form}, in {Path(geventbatch.__file__).parent}")
    if not geventbatch.COMPILED:
        _line("", TO_COMPILE)
    _line("Python", f"{platform.python_version()}, {platform.python_implementation()}, {platform.platform()}")
    loop = type(gevent.get_hub().loop).__module__.removeprefix("gevent.")
    _line("gevent", f"{gevent.__version__} ({loop}), {_installed(('greenlet',))}")
    for title, names in NAMES.items():
        if installed := _installed(names):
            _line(title, installed)


def _check(module: str | None) -> int:
    if module is not None:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit):
            traceback.print_exc()
            _line("check_setup", f"not asked: importing {module} raised what is above")
            return 2
    problems = geventbatch.check_setup()
    for problem in problems:
        _line("check_setup", f"{problem.name}: {problem}")
    if not problems and module is None:
        _line("check_setup", "nothing, and no application was looked at: python -m geventbatch MODULE imports one")
    elif not problems:
        _line("check_setup", f"nothing, after importing {module}")
    return min(len(problems), 1)


def main(arguments: list[str]) -> int:
    """Print it all, and return the status."""
    monkey.patch_all()
    setup_check.patched.first = True  # of the application, nothing is imported yet
    parser = argparse.ArgumentParser(
        prog="python -m geventbatch",
        allow_abbrev=False,
        description="Say which form of geventbatch runs, with which versions, and what check_setup() finds.",
        epilog="The status is 0; 1 if check_setup() has found something, 2 if MODULE cannot be imported.",
    )
    parser.add_argument("module", nargs="?", metavar="MODULE", help="the application: shop.wsgi, or shop.wsgi:app")
    module: str | None = parser.parse_args(arguments).module
    _describe()
    sys.stdout.flush()  # a traceback comes behind it
    return _check(module and module.partition(":")[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
