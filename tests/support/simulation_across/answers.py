"""What the callers of the simulation are answered, and whether that may be."""

from __future__ import annotations

from itertools import islice
from typing import Any

import gevent
from gevent import GreenletExit

from geventbatch import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NotSaved,
    OperationCancelled,
    ProcessorOverloaded,
    ProcessorStopped,
    SaveFailed,
)
from tests.support.simulation_across.bank import BankLife
from tests.support.simulation_across.reached import reach
from tests.support.simulation_across.world import KEYS, AcrossCall

_ROUNDING = 1e-6


class AnswersLife(BankLife):
    """Judges answers."""

    def _saved_at(self, call: AcrossCall) -> int:
        """The number of its keys at which it is saved: all or none of them, at any time that anybody looks."""
        at = [key for key in KEYS if call.number in self.world.kept[key]]
        if at and set(at) != set(call.keys):
            self.world.wrong(f"{call} of {call.keys} is saved at {at} only")
        return len(at)

    def _returned(self, call: Any, value: object) -> None:
        call.fate = "saved"
        if call.after_stop:
            self.world.wrong(f"{call} was admitted after stop()")
        if value is None or value is not call.last:
            self.world.wrong(f"{call} was answered {value!r}, but has returned {call.last!r} last")
        if call.reads:
            reach("read, at several keys" if len(call.keys) > 1 else "read one key")
            if self._is_before_the_save(call):
                self.world.wrong(f"{call} was answered with what is not saved yet")
        elif not self._saved_at(call):
            self.world.wrong(f"{call} was answered, but is not saved")
        if self.stopping and call.several:
            reach("saved after stop")

    def _judge(self, call: Any, error: BaseException) -> None:
        wrong = self.world.wrong
        if error is call.timer or isinstance(error, GreenletExit) or (call.alone and isinstance(error, gevent.Timeout)):
            call.fate = "left"
            how = "by its own Timeout" if error is call.timer else "by a kill"
            reach("left after it had started" if call.starts else f"left before it started, {how}")
            return
        if error is call.raised:
            call.fate = "raised"
            if self._is_before_the_save(call):
                wrong(f"{call} was answered with its own {error!r} before the save")
        elif isinstance(error, BatchError):
            call.fate = "safe" if error.retry_safe else "unknown"
            reason = self._contradiction(call, error)
            if reason:
                wrong(f"{call} of {call.keys} was answered with {error!r}: {reason}")
            self._check_own(call, error)
        else:
            wrong(f"{call} was answered with {error!r}")
            call.fate = "unknown"
        if call.fate != "unknown" and self._saved_at(call):
            wrong(f"{call} was answered with {error!r}, but is saved")
        if call.after_stop and type(error) is not ProcessorStopped:
            wrong(f"{call} came after stop(), and was answered with {error!r}")

    def _is_before_the_save(self, call: AcrossCall) -> bool:
        """Return whether something of its component, which it was judged by, is still to be saved."""
        visit = call.at
        if visit is None or call.alone or visit.began or visit.over or visit.run.interrupted:
            return False
        mine = visit.connected(call.key)
        saved = (one for one in visit.applied if one.number in visit.returned and not one.reads)
        return any(set(one.keys) & mine for one in saved)

    def _contradiction(  # noqa: PLR0911 - a list
        self, call: Any, error: BatchError
    ) -> str:
        """Say what is wrong with *error*, if anything, as an outcome of *call*."""
        if not error.retry_safe and not self._was_being_saved(call):
            return "certainly nothing was saved"
        if isinstance(error, BatchAborted):
            return self._contradiction_of_batch(call, error)
        if call.starts or not error.retry_safe:
            return f"it has been started {call.starts} times"
        if isinstance(error, OperationCancelled):
            return self._contradiction_of_cancelled(call, error)
        if isinstance(error, ProcessorStopped):
            if call.several:
                reach("refused after stop")
            return "" if self.stopping else "nobody has called stop()"
        if not isinstance(error, ProcessorOverloaded):
            return "of all errors"
        if call.several:
            reach("refused by max_pending")
        most = self.choices.max_pending
        pending = sum(1 for _ in islice((other for other in self.calls if other.waiting), most))  # looks no further
        return f"only {pending} are pending" if most is None or pending < most else ""

    def _was_being_saved(self, call: AcrossCall) -> bool:
        """Return whether it was being saved; one that raised may be told what became of a save without it."""
        visit = call.at
        if visit is None:
            return False
        return bool(visit.unclear or (visit.run.unclear and call.number not in visit.returned))

    def _contradiction_of_cancelled(self, call: AcrossCall, error: OperationCancelled) -> str:
        if call.several:
            reach("cancelled by start_timeout")
        if "which other operations hold" in str(error):
            reach("cancelled at a key that others hold")
        early = call.start_timeout is None or self.world.clock.now() < call.came + call.start_timeout - _ROUNDING
        return "its start_timeout has not passed" if early or not isinstance(error, TimeoutError) else ""

    def _contradiction_of_batch(  # noqa: PLR0911 - a list
        self, call: Any, error: BatchAborted
    ) -> str:
        cause = error.__cause__
        if error.keys != call.keys or error.key not in call.keys or cause is None:
            return f"its key is {error.key!r}, its keys are {error.keys}, its cause {cause!r}"
        if isinstance(error, BatchTimeout):
            if error.retry_safe != (error.phase != "save"):
                return f"its phase is {error.phase!r}"
            doing = {"load": "a load", "operations": "an operation", "save": "a save"}
            reach(f"deadline in {doing[error.phase]}")
            runs = self.runs.values() if call.run is None else [call.run]
            passed = any(self.world.clock.now() >= run.began + self.choices.max_duration - _ROUNDING for run in runs)
            return "" if passed or call.alone else "no deadline has passed"
        if isinstance(error, SaveFailed):
            if not error.retry_safe:
                reach("a save failed, outcome unknown")
            return "" if error.retry_safe == isinstance(cause, NotSaved) else f"its cause is {cause!r}"
        if isinstance(error, LoadFailed):
            if not error.retry_safe:
                return "nothing can have been saved"
            known = call.doomed or call.alone or call.starts or self.choices.numbering or isinstance(cause, Conflict)
            if not known:
                return "it came after that load"
            return "" if isinstance(cause, Conflict) or call.alone or error.key in self.failed else "its key was loaded"
        return "" if type(error) is BatchAborted else "of all errors"
