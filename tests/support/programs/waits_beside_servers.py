"""A test that never ends, with servers, for tests/repository/test_the_suite.py, which ends it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gevent
import pytest

from tests.support.redis_server import own_server
from tests.support.servers import _embedded_postgres


@pytest.mark.timeout(0)
def test_that_waits() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = [os.getpid(), child.pid, int(own_server()._pid_file.read_text()), _embedded_postgres().get_pid()]
    if os.environ["DEAF"] == "yes":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = Path(os.environ["TELLS"])
    told.with_suffix(".part").write_text(json.dumps([os.environ["TMPDIR"], started]))
    told.with_suffix(".part").rename(told)
    gevent.sleep(600)
