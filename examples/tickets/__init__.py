"""Book seats on trains: one train is one resource, and every booking for it goes through one batch.

Read in the order of a booking: `domain` says what may happen to a train, `storage` loads and saves one, `web` joins the
two through a `geventbatch.Processor`, `gunicorn.conf.py` runs it in several gevent workers and stops it without loss.
"""
