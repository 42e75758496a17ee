"""What every operation passes, from `run` to its answer: compiled whole (see setup.py)."""
