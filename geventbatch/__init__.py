"""Batches of operations on one resource, for gevent: load once, apply all, save once, answer every caller.

>>> processor = Processor(open_resource=store, min_duration=0, max_duration=5)  # doctest: +SKIP
>>> seat = processor.run("ICE 1", Train.book, 12, "Ann")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any, Final

from geventbatch._batch import Batch, current_batch
from geventbatch._core import run
from geventbatch._processor import Processor, stop_all
from geventbatch._renamed import renamed
from geventbatch._watch.metrics import BatchMetric, MetricSubscription
from geventbatch._watch.problem import SetupProblem
from geventbatch._watch.setup_check import check_setup
from geventbatch._watch.stats import LiveBatch, ProcessorStats
from geventbatch._worker_number import worker_number_for_key
from geventbatch.errors import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    Conflict,
    IdempotencyKeyReused,
    LoadFailed,
    NothingToSave,
    NotSaved,
    OperationCancelled,
    PartlySaved,
    ProcessorOverloaded,
    ProcessorStopped,
    Rejected,
    Repeated,
    ResourceMissing,
    SaveFailed,
)

COMPILED: Final = not run.__file__.endswith(".py")
"""True if the core runs compiled, as in a wheel for this platform; False if it runs as plain Python."""

__version__ = "0.1.0"

__all__ = [
    "COMPILED",
    "Batch",
    "BatchAborted",
    "BatchError",
    "BatchMetric",
    "BatchTimeout",
    "Conflict",
    "IdempotencyKeyReused",
    "LiveBatch",
    "LoadFailed",
    "MetricSubscription",
    "NotSaved",
    "NothingToSave",
    "OperationCancelled",
    "PartlySaved",
    "Processor",
    "ProcessorOverloaded",
    "ProcessorStats",
    "ProcessorStopped",
    "Rejected",
    "Repeated",
    "ResourceMissing",
    "SaveFailed",
    "SetupProblem",
    "check_setup",
    "current_batch",
    "stop_all",
    "worker_number_for_key",
]

if TYPE_CHECKING:
    from typing_extensions import deprecated

    BatchMetrics = MetricSubscription
    Problem = SetupProblem

    @deprecated("Renamed: check_setup")
    def check() -> list[SetupProblem]: ...
else:

    def __getattr__(name: str) -> Any:
        old = {"BatchMetrics": "MetricSubscription", "Problem": "SetupProblem", "check": "check_setup"}
        return renamed(__name__, name, old)
