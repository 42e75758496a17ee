"""The tickets behind nginx: several gunicorns of one worker each, and every train has one of them.

`nginx` says which backend has a train and what becomes of a call whose backend is gone, `backends` starts and ends
them and puts them behind nginx, `database` gives them all one PostgreSQL. docs/processes.md says why,
and has the same with HAProxy, with Envoy and under Kubernetes.
"""
