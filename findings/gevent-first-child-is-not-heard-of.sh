#!/usr/bin/env bash
# gevent 26.9.0: after monkey.patch_all(), os.waitpid(pid, os.WNOHANG) says of a process's first child that it runs, though it has ended.
#
# The patched os.fork() forks first and makes the hub, and the handler of SIGCHLD with it, after that. A child that ends within these milliseconds
# sends its signal to nobody, and the patched os.waitpid() asks only what that handler has noted: it never asks the system, which holds
# the status all the while. The end of a later child mends it, since the handler then collects all that have ended. Where the handler is there
# before the fork (an earlier child, or loop.install_sigchld()), each is heard of.
#
# A race, which the child nearly always wins: five processes of each kind. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet gevent==26.9.0
cat > "$folder/one.py" <<'PYTHON'
from gevent import monkey

monkey.patch_all()

import os
import sys

import gevent

if sys.argv[1] == "handler-first":
    gevent.get_hub().loop.install_sigchld()
pid = os.fork()
if pid == 0:
    os._exit(3)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended; its status can still be fetched
for _ in range(40):
    gevent.sleep(0.005)
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        break
if found:
    print("heard")
else:
    assert monkey.get_original("os", "waitpid")(pid, os.WNOHANG) == (pid, 3 << 8)
    print("not heard")
PYTHON
cat > "$folder/run.py" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

found = {}
for kind in ("plain", "handler-first"):
    command = [sys.executable, f"{sys.argv[1]}/one.py", kind]
    found[kind] = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for _ in range(5)]
    print(f"gevent {version('gevent')}: {kind}: {found[kind].count('not heard')} of 5 children that had ended were not heard of")
assert "not heard" in found["plain"], found
assert found["handler-first"] == ["heard"] * 5, found
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
