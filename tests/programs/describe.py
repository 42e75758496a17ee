"""Prints what tells the operations of tests/plain.py from others, as this process has it."""

from __future__ import annotations

import json
import sys

from geventbatch._idempotency.values import describe
from tests.plain import OPERATIONS

json.dump([describe(operation, args) for operation, args in OPERATIONS], sys.stdout)
