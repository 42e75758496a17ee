"""What pyproject.toml cannot say: with GEVENTBATCH_COMPILE=1, mypyc compiles the modules that every operation passes.

The same sources run as plain Python, which is the default. Compiling takes mypy, gevent and its stubs, a C compiler and
the headers of Python.
"""

import os

from setuptools import setup

HOT = (
    "alarm",
    "applying",
    "attempt",
    "batch",
    "clock",
    "counts",
    "lane",
    "operation",
    "pace",
    "parts",
    "process",
    "replay",
    "runner",
    "scope",
    "shard",
    "state",
    "steps",
    "turns",
    "undo",
    "verdict",
)

if os.environ.get("GEVENTBATCH_COMPILE") == "1":
    from mypyc.build import mypycify

    modules = mypycify([f"geventbatch/_{name}.py" for name in HOT], opt_level="3", group_name="geventbatch")
    setup(ext_modules=modules)
else:
    setup()
