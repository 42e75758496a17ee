"""``python -m geventbatch [MODULE]`` says which form runs, with which versions, and what `check_setup` finds in MODULE.

It patches first, executes gunicorn's configuration if ``--config`` names it, and then imports MODULE: the application
as gunicorn's gevent worker would import it (``shop.wsgi``, ``shop.wsgi:app``, ``shop:create_app()``). The status is 0,
or 1 if `check_setup` has found something, or 2 if there is no such application. Paste what it prints into a report of a
defect.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import platform
import runpy
import sys
import textwrap
import traceback
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Final

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

FACTORIES: Final = ("create_app", "make_app")
"""What Flask calls by itself if an application is named by its module only."""

OF_WSGI: Final = 2
"""The arguments of a WSGI application: the environment and start_response."""

TO_COMPILE: Final = (
    "The compiled form takes less CPU time. With a C compiler and the headers of Python, install again what you have "
    "installed, SOURCE (the directory of a clone, or geventbatch itself where an index has it): GEVENTBATCH_COMPILE=1 "
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary geventbatch SOURCE"
)

TO_PATCH: Final = (
    "This command sees patch_psycopg() in the application's modules and, with --config gunicorn.conf.py, at the top of "
    "that file; not in a hook of gunicorn such as post_fork."
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


def _hidden_by(folder: Path) -> Path | None:
    """Return where the package is installed, if it was imported from *folder* instead, such as that of a clone."""
    with suppress(metadata.PackageNotFoundError):
        installed = Path(str(metadata.distribution("geventbatch").locate_file("geventbatch")))
        if installed.is_dir() and installed.resolve() != folder.resolve():
            return installed
    return None


def _describe() -> None:
    form = "compiled" if geventbatch.COMPILED else "pure Python"
    folder = Path(geventbatch.__file__).parent
    _line("geventbatch", f"{geventbatch.__version__}, {form}, in {folder}")
    if installed := _hidden_by(folder):
        _line("", f"That hides the one that is installed, in {installed}: run this in another directory to see that.")
    if not geventbatch.COMPILED:
        _line("", TO_COMPILE)
    _line("Python", f"{platform.python_version()}, {platform.python_implementation()}, {platform.platform()}")
    loop = type(gevent.get_hub().loop).__module__.removeprefix("gevent.")
    _line("gevent", f"{gevent.__version__} ({loop}), {_installed(('greenlet',))}")
    for title, names in NAMES.items():
        if versions := _installed(names):
            _line(title, versions)


class _NoApplication(Exception):
    """Nothing can be loaded by that name; the message says what to do."""


def _load(target: str) -> tuple[str, object]:
    """Import MODULE of *target*, and call NAME if it is a call. Return what to say of it, and the application.

    Raises:
        _NoApplication: NAME is not in MODULE, or is a factory that is not called.
    """
    module, colon, expression = target.partition(":")
    name, called = _parsed(expression) if colon else ("", None)
    imported = importlib.import_module(module)
    if not colon:
        uncalled = [one for one in FACTORIES if _is_factory(getattr(imported, one, None))]
        unless = "".join(f"; if it does not call its {one}, name it: '{module}:{one}()'" for one in uncalled)
        return f"importing {module}{unless}", imported
    if not hasattr(imported, name):
        raise _NoApplication(f"{module} has no {name}")
    found = getattr(imported, name)
    if called is not None:
        args, kwargs = called
        return f"calling {target}", found(*args, **kwargs)
    if _is_factory(found):
        raise _NoApplication(f"{target} is a factory, and was not called: '{target}()' calls it")
    return f"importing {target}", found


def _parsed(expression: str) -> tuple[str, tuple[list[Any], dict[str, Any]] | None]:
    """Return the name in *expression*, and the arguments if it is a call: gunicorn takes the same."""
    with suppress(SyntaxError, ValueError):
        match ast.parse(expression, mode="eval").body:
            case ast.Name(id=name):
                return name, None
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(one.arg for one in keywords):
                given = {str(one.arg): ast.literal_eval(one.value) for one in keywords}
                return name, ([ast.literal_eval(one) for one in args], given)
    raise _NoApplication(f"{expression!r} is neither a name nor a call of one with literal arguments")


def _is_factory(found: object) -> bool:
    """Return whether *found* is a function, but no WSGI application, which cannot do without two arguments."""
    if not inspect.isfunction(found):
        return False
    parameters = inspect.signature(found).parameters.values()
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return False  # a wrapper, of either
    needed = [one for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return len(needed) != OF_WSGI


def _check(target: str | None, config: str | None) -> int:
    doing, done, application = "", "", None
    try:
        if config is not None:
            doing = f"executing {config}"
            runpy.run_path(config, run_name="__config__")  # the name that gunicorn gives it
        if target is not None:
            doing = f"importing {target}"
            done, application = _load(target)
    except _NoApplication as error:
        _line("check_setup", f"not asked: {error}")
        return 2
    except (Exception, SystemExit):
        traceback.print_exc()
        _line("check_setup", f"not asked: {doing} raised what is above")
        return 2
    problems = geventbatch.check_setup()
    del application  # its processors were alive until now
    for problem in problems:
        _line("check_setup", f"{problem.name}: {problem}")
        if problem.name == "psycopg2":
            _line("", TO_PATCH)
    if not problems and target is None:
        _line("check_setup", "nothing, and no application was looked at: python -m geventbatch MODULE imports one")
    elif not problems:
        _line("check_setup", f"nothing, after {done}")
    return min(len(problems), 1)


def _take_gauges_back() -> None:
    """Delete the gauges that the application has left for this process, where a running server has its own."""
    if "prometheus_client" in sys.modules and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        importlib.import_module("prometheus_client.multiprocess").mark_process_dead(os.getpid())


def main(arguments: list[str]) -> int:
    """Print it all, and return the status."""
    monkey.patch_all()
    setup_check.patched.first = True  # of the application, nothing is imported yet
    parser = argparse.ArgumentParser(
        prog="python -m geventbatch",
        allow_abbrev=False,
        description="Say which form of geventbatch runs, with which versions, and what check_setup() finds.",
        epilog="The status is 0; 1 if check_setup() has found something, 2 if there is no such application.",
    )
    parser.add_argument(
        "module", nargs="?", metavar="MODULE", help="the application: shop.wsgi, shop.wsgi:app or 'shop:create_app()'"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="gunicorn's configuration, executed first: gunicorn.conf.py; its settings and hooks are not looked at",
    )
    given = parser.parse_args(arguments)
    _describe()
    sys.stdout.flush()  # a traceback comes behind it
    try:
        return _check(given.module, given.config)
    finally:
        _take_gauges_back()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
