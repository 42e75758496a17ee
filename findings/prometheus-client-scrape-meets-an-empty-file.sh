#!/usr/bin/env bash
# prometheus_client 0.26.0, several processes: a scrape raises struct.error while another process of the same application makes its first metric.
#
# Each process writes its metrics into files of its own in PROMETHEUS_MULTIPROC_DIR, which MultiProcessCollector reads. A process makes such a file
# empty and gives it its length in the next step. A scrape that looks in between fails as a whole, for all processes: "unpack_from requires a
# buffer of at least 4 bytes". So each start or restart of a worker, and each metric of a new kind, may cost a scrape.
#
# A race: one process makes files as workers do that come and go, another one scrapes for five seconds. Exits 0 while some scrapes fail so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet prometheus_client==0.26.0
mkdir "$folder/metrics"
cat > "$folder/run.py" <<'PYTHON'
import os
import struct
import time
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

end = time.monotonic() + 5
if os.fork() == 0:  # the one whose workers come and go
    while time.monotonic() < end:
        worker = os.fork()
        if worker == 0:
            Gauge("trains", "Trains", multiprocess_mode="livesum").set(1)
            os._exit(0)
        os.waitpid(worker, 0)
        mark_process_dead(worker)
    os._exit(0)
done, failed = 0, set()
while time.monotonic() < end:
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    try:
        generate_latest(registry)
        done += 1
    except struct.error as error:
        failed.add(str(error))
os.wait()
print(f"prometheus_client {version('prometheus_client')}: scrapes succeeded: {done > 0}; others failed with: {sorted(failed)}")
assert done and failed, (done, failed)
PYTHON
PROMETHEUS_MULTIPROC_DIR="$folder/metrics" "$folder/venv/bin/python" "$folder/run.py"
# printed: prometheus_client 0.26.0: scrapes succeeded: True; others failed with:
# ['unpack_from requires a buffer of at least 4 bytes for unpacking 4 bytes at offset 0 (actual buffer size is 0)']
