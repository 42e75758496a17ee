"""setuptools' build backend, which decides the form of a wheel, compiled or pure, and asks for mypy only for the first.

GEVENTBATCH_COMPILE=1 compiles or fails, 0 does not compile. By default a wheel is compiled where there is a compiler,
and pure where there is none or where compiling fails. An editable install is pure, unless 1 asks for the other: what is
edited is what runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - all that is not said otherwise below

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWITCH: Final = "GEVENTBATCH_COMPILE"
_TO_COMPILE: Final = ["mypy==2.4.*", "gevent>=25.9.1", "types-gevent>=25.9"]

_Settings = dict[str, str | list[str] | None] | None


def _asked() -> str:
    asked = os.environ.get(_SWITCH, "")
    if asked not in {"", "0", "1"}:
        raise SystemExit(f"{_SWITCH}={asked}: 1 compiles or fails, 0 does not compile; unset, a compiler decides")
    return asked


def _can_compile() -> bool:
    """Return whether this Python is one that mypyc compiles for, and its compiler and its headers are here."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return (
        sys.implementation.name == "cpython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and shutil.which(compiler[0]) is not None
        and Path(sysconfig.get_path("include"), "Python.h").is_file()
    )


@contextmanager
def _form(switch: str) -> Iterator[None]:
    """Have setup.py see *switch*."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = switch
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def get_requires_for_build_wheel(_settings: _Settings = None) -> list[str]:
    """Return what pip has to install first, which setuptools would run setup.py to find out, which needs it."""
    asked = _asked()
    return _TO_COMPILE if asked == "1" or (not asked and _can_compile()) else []


def get_requires_for_build_editable(_settings: _Settings = None) -> list[str]:
    """Return the same for an editable install."""
    return _TO_COMPILE if _asked() == "1" else []


def get_requires_for_build_sdist(_settings: _Settings = None) -> list[str]:
    """Return nothing: in an sdist nothing is compiled."""
    return []


def prepare_metadata_for_build_wheel(directory: str, settings: _Settings = None) -> str:
    """Write the metadata, which are those of both forms."""
    with _form("0"):
        return build_meta.prepare_metadata_for_build_wheel(directory, settings)


def prepare_metadata_for_build_editable(directory: str, settings: _Settings = None) -> str:
    """Write the metadata, as for a wheel."""
    with _form("0"):
        return build_meta.prepare_metadata_for_build_editable(directory, settings)


def build_sdist(directory: str, settings: _Settings = None) -> str:
    """Pack the sources."""
    with _form("0"):
        return build_meta.build_sdist(directory, settings)


def build_wheel(directory: str, settings: _Settings = None, metadata: str | None = None) -> str:
    """Build a wheel; without a word of the user's about its form, a pure one if it cannot be compiled."""
    asked = _asked()
    if asked == "1" or (not asked and _can_compile()):
        try:
            with _form("1"):
                return build_meta.build_wheel(directory, settings, metadata)
        except (Exception, SystemExit):  # the latter is what setuptools and mypyc end with
            if asked == "1":
                raise
            traceback.print_exc()
            print(f"geventbatch could not be compiled (above): this wheel is pure Python. {_SWITCH}=1 fails instead.")
    with _form("0"):
        return build_meta.build_wheel(directory, settings, metadata)


def build_editable(directory: str, settings: _Settings = None, metadata: str | None = None) -> str:
    """Install in place, pure unless the user asks for the compiled form."""
    with _form(_asked() or "0"):
        return build_meta.build_editable(directory, settings, metadata)
