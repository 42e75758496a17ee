"""Prints what tells the operations of tests/support/plain.py from others, as this process has it."""

from __future__ import annotations

import json
import sys

from geventbatch._idempotency.value_text import describe
from tests.support.plain import OPERATIONS

json.dump([describe(operation, args) for operation, args in OPERATIONS], sys.stdout)
