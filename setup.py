"""What pyproject.toml cannot say: with GEVENTBATCH_COMPILE=1, mypyc compiles the folder `geventbatch/_core`.

That is what every operation passes; with it go the subclasses of its classes, which could not be made otherwise. The
same sources run as plain Python. Compiling takes mypy, gevent and its stubs, a C compiler and the headers of Python;
whether there are is looked at in .ci/backend.py, which decides what pip installs.
"""

import os
from pathlib import Path

from setuptools import setup

if os.environ.get("GEVENTBATCH_COMPILE") == "1":
    from mypyc.build import mypycify

    core = sorted(Path("geventbatch/_core").glob("*.py"))
    subclasses = [Path("geventbatch/_bulk/component.py"), Path("geventbatch/_bulk/crossing.py")]
    modules = mypycify([str(path) for path in core + subclasses], opt_level="3", group_name="geventbatch")
    setup(ext_modules=modules)
else:
    setup()
