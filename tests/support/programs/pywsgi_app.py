"""The application of `gunicorn_app`, on `gevent.pywsgi`; its status is 3 if some batch has not ended."""

from gevent import monkey

monkey.patch_all()

import logging
import os
import signal
import sys

from gevent.pywsgi import WSGIServer

from geventbatch.integrations.pywsgi import serve
from tests.support.programs.gunicorn_app import app

if __name__ == "__main__":
    logging.basicConfig()
    if "IGNORE_HUP" in os.environ:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server = WSGIServer(("127.0.0.1", 0), app, spawn=1000, log=None)
    server.start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.exit(0 if serve(server, timeout=float(os.environ["TIMEOUT"])) else 3)
