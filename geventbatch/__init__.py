"""Batches of operations on one resource, for gevent: load once, apply all, save once, answer every caller.

>>> processor = Processor(open_resource=store, min_duration=0, max_duration=5)  # doctest: +SKIP
>>> seat = processor.run("ICE 1", Train.book, 12, "Ann")  # doctest: +SKIP
"""

from typing import Final

from geventbatch import _runner
from geventbatch._batch import Batch
from geventbatch._check import check
from geventbatch._keys import worker_number_for_key
from geventbatch._live import LiveBatch, ProcessorStats
from geventbatch._metrics import BatchMetric, BatchMetrics
from geventbatch._problem import Problem
from geventbatch._processor import Processor, current_batch, stop_all
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
    ResourceMissing,
    SaveFailed,
)

COMPILED: Final = not _runner.__file__.endswith(".py")
"""Whether what every operation passes runs compiled, as in a wheel for this platform, or as plain Python."""

__version__ = "0.1.0"

__all__ = [
    "COMPILED",
    "Batch",
    "BatchAborted",
    "BatchError",
    "BatchMetric",
    "BatchMetrics",
    "BatchTimeout",
    "Conflict",
    "IdempotencyKeyReused",
    "LiveBatch",
    "LoadFailed",
    "NotSaved",
    "NothingToSave",
    "OperationCancelled",
    "PartlySaved",
    "Problem",
    "Processor",
    "ProcessorOverloaded",
    "ProcessorStats",
    "ProcessorStopped",
    "Rejected",
    "ResourceMissing",
    "SaveFailed",
    "check",
    "current_batch",
    "stop_all",
    "worker_number_for_key",
]
