"""The world of operations across keys: virtual time, a store of many keys, and one processor at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tests.support.simulation import Call, Choices, Life, World

if TYPE_CHECKING:
    from geventbatch import Batch

KEYS = "Mabcdefg"


@dataclass(frozen=True)
class AcrossChoices(Choices):
    """How a processor is made that has operations across keys."""

    opens: Literal["by hand", "by a pair", "by a store"] = "by hand"  # that opens single keys in a form of their own
    max_bulk: int = 100


@dataclass(eq=False)
class AcrossCall(Call):
    """One `run` or `run_across` of one caller."""

    keys: tuple[str, ...] = ()
    # -- mutable state -------------------------------------------------------------------------------------
    run: Run | None = None  # in which it was applied
    at: BulkVisit | None = None  # in which it was applied last
    came_during: frozenset[BulkVisit] = frozenset()  # loads that it could join
    last_end: str = ""  # how its operation ended last
    dropped: bool = False  # it had started, but the load of one of its keys has failed in a replay

    @property
    def reads(self) -> bool:
        """Whether it is read-only."""
        return self.acts[0].end == "read"

    @property
    def several(self) -> bool:
        return len(self.keys) > 1 or not self.number % 2


@dataclass(eq=False, slots=True, weakref_slot=True)
class Account:
    """What a load gives: a copy of what is saved, and its version."""

    of: Any  # written in C: no copy is made of it
    key: str
    entries: list[int]
    version: int

    @property
    def visit(self) -> BulkVisit:
        visit: BulkVisit = self.of()[0]
        return visit


@dataclass(eq=False, slots=True)
class Run:
    """What one worker runs together: from its first load to its last save, its replays and halves included."""

    began: float
    spent_before: float
    # -- mutable state -------------------------------------------------------------------------------------
    batches: list[Batch] = field(default_factory=list)
    spent: float = 0.0  # by its own code
    rounds: int = 0
    held: dict[Batch, set[str]] = field(default_factory=dict)  # the keys that each batch, or component, has ever loaded
    first: dict[Batch, int] = field(default_factory=dict)  # ticks of the first operation of each batch
    keys: set[str] = field(default_factory=set)
    conflict_at: float | None = None
    interrupted: bool = False  # by its deadline
    unclear: bool = False  # a save of it may have been carried out, though it raised
    at_key: dict[str, set[int]] = field(default_factory=dict)  # calls that were applied, by key


@dataclass(eq=False, slots=True)
class BulkVisit:
    """A load of some keys, and what follows up to the save."""

    keys: list[str]
    run: Run
    caller: AcrossCall | None  # who runs it alone
    # -- mutable state -------------------------------------------------------------------------------------
    holds: set[str] = field(default_factory=set)  # its keys, and what its components have lost: free when those end
    loaded_tick: int = 0  # 0 is never
    loaded: dict[str, list[int]] = field(default_factory=dict)
    applied: list[AcrossCall] = field(default_factory=list)  # each once, in the order they were applied first
    returned: set[int] = field(default_factory=set)  # calls
    began: bool = False  # its save has
    unclear: bool = False  # its save may have been carried out, though it raised
    over: bool = False  # it has been left
    failed: set[str] = field(default_factory=set)  # keys whose load has failed, and no other's
    phase: str = "a load"

    @property
    def alone(self) -> bool:
        return self.caller is not None

    def expected(self, key: str, before: AcrossCall | None = None) -> list[int]:
        """What has to be in the account of *key*: for an operation that is applied (again), and at the end."""
        calls = self.applied[: self.applied.index(before)] if before in self.applied else self.applied
        changed = (call for call in calls if key in call.keys and call.number in self.returned and not call.reads)
        return self.loaded[key] + [call.number for call in changed]

    def connected(self, key: str) -> set[str]:
        """Return the keys that operations that were applied connect with *key*."""
        found: set[str] = {key}
        before: set[str] = set()
        while found != before:
            before = set(found)
            for call in self.applied:
                if found & set(call.keys):
                    found |= set(call.keys)
        return found


class AcrossWorld(World):
    """Virtual time, a store of many keys and a processor."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept: dict[str, list[int]] = {key: [] for key in KEYS}
        self.versions = dict.fromkeys(KEYS, 0)

    def make_life(self, choices: Choices) -> Life:
        from tests.support.simulation_across.life import AcrossLife

        assert isinstance(choices, AcrossChoices)
        return AcrossLife(self, choices)

    def write_foreign(self, key: str) -> None:
        self.kept[key].append(-1)
        self.versions[key] += 1
