"""Tools for the tests of an application: see docs/testing.md.

- `virtual_time`: windows, deadlines and backoffs pass without waiting.
- `faults`: loads and saves that fail, hang, conflict, or lose their answer.
- `check_operations`: finds operations that cannot be replayed, or that leave changes behind when they raise.
- `batching_off`: operations run in the caller's own greenlet, on its own connection.
- `store_contract`: the checks that a store of your own has to pass; see docs/own-stores.md.
- `joined_engine`: for SQLAlchemy, an engine on the test's connection, whose transaction is rolled back at the end.

They take a `Processor`, or, inside an application context, what `GeventBatch.processor` of the Flask integration
returned. ``pytest_geventbatch`` has fixtures of the same.
"""

from typing import TYPE_CHECKING, Any

from geventbatch._renamed import renamed
from geventbatch.testing._batching import batching_off
from geventbatch.testing._connection import joined_engine
from geventbatch.testing._faults import Fault, FaultPlan, faults
from geventbatch.testing._operations import ImpureOperation, check_operations
from geventbatch.testing._store_bench import StoreBench
from geventbatch.testing._store_contract import StoreCheck, store_contract
from geventbatch.testing._values import state_of
from geventbatch.testing._virtual_time import VirtualTime, virtual_time

__all__ = [
    "Fault",
    "FaultPlan",
    "ImpureOperation",
    "StoreBench",
    "StoreCheck",
    "VirtualTime",
    "batching_off",
    "check_operations",
    "faults",
    "joined_engine",
    "state_of",
    "store_contract",
    "virtual_time",
]

if TYPE_CHECKING:
    Faults = FaultPlan
else:

    def __getattr__(name: str) -> Any:
        return renamed(__name__, name, {"Faults": "FaultPlan"})
