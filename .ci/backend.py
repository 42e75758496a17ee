"""setuptools' build backend, which asks for mypy only where GEVENTBATCH_COMPILE=1 has setup.py compile."""

from __future__ import annotations

import os

from setuptools.build_meta import *  # noqa: F403 - all that is not said otherwise below

_TO_COMPILE = ["mypy==2.4.*", "gevent>=25.9.1", "types-gevent>=25.9"]


def get_requires_for_build_wheel(_settings: object = None) -> list[str]:
    """Give what pip has to install first, which setuptools would run setup.py to find out, which needs it."""
    return _TO_COMPILE if os.environ.get("GEVENTBATCH_COMPILE") == "1" else []


get_requires_for_build_editable = get_requires_for_build_wheel
