"""Read by mypy and pyright, never run: `geventbatch.testing`, as `usage` does the rest."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import assert_type

from geventbatch import Processor
from geventbatch.integrations.flask import GeventBatch
from geventbatch.testing import (
    Fault,
    FaultPlan,
    Faults,
    StoreBench,
    StoreCheck,
    VirtualTime,
    batching_off,
    check_operations,
    faults,
    state_of,
    store_contract,
    virtual_time,
)
from tests.support.typing.usage import Train, store

processor = Processor(open_resource=store)
declared = GeventBatch().processor(open_resource=store)

with virtual_time(seed=1) as clock:
    assert_type(clock, VirtualTime)

with faults(processor) as plan, faults(declared) as other:
    assert_type(plan, FaultPlan)
    assert_type(other, FaultPlan)
    fault = plan.fail_load(OSError("gone"), nth=2, times=None, key=("a", 1))
    assert_type(fault, Fault)
    assert_type(plan.fail_save(OSError), Fault)
    assert_type(plan.hang_save(0.5, saved=True), Fault)
    assert_type(plan.hang_load(), Fault)
    assert_type(plan.conflict(times=3), Fault)
    assert_type(plan.lose_answer(), Fault)
    assert_type(fault.wait(1.0), bool)
    assert_type((plan.loads, fault.happened), tuple[int, int])
    plan.fail_load("gone")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    plan.fail_load()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    plan.conflict(nth="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

with faults(store):  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pass

with batching_off(), batching_off(processor, declared):
    pass

with check_operations(), check_operations(processor, declared, skip=["differs", "shares"]):
    pass

with check_operations(processor, copy=deepcopy, state=state_of, around=nullcontext):
    pass

with check_operations(processor, skip=["alike"]):  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    pass

with check_operations(processor, copy=Train()):  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pass

# The old name of the plan, for one release.


def old(plan: Faults) -> None:
    assert_type(plan, FaultPlan)


class Bench(StoreBench):
    load_marker = b"SELECT"
    save_marker = b"COMMIT"

    def open_store(self, server: tuple[str, int] | str | None, /) -> AbstractContextManager[object]:
        return nullcontext(store)

    def add(self, resource: Train, amount: int, /) -> int:
        return amount

    def get(self, key: str, /) -> int | None:
        return None

    def put(self, key: str, total: int, /) -> None: ...

    def key(self, number: int, /) -> str:
        return f"ICE {number}"


checks = store_contract(Bench)
assert_type(checks, list[StoreCheck])
assert_type(checks[0](Bench()), None)
assert_type(str(checks[0]), str)
store_contract(Train)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
StoreBench()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
