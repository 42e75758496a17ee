"""The way of every operation, from `run` to its answer. It is compiled as one folder (see setup.py)."""
