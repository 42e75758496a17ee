"""`store_contract`: the checks that a store has to pass, for its author."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import getdoc
from typing import TYPE_CHECKING

from geventbatch.testing._store_bench import StoreBench
from geventbatch.testing._store_trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class StoreCheck:
    """One check of `store_contract`. Call it with a `StoreBench`; its `str` is its name.

    Raises:
        AssertionError: The store does not do so; the message says what happened.
    Switches: yes.
    """

    name: str
    _check: Callable[[Trial], None]

    def __str__(self) -> str:
        """Return the name, for ``ids=str``."""
        return self.name

    def __call__(self, bench: StoreBench) -> None:
        """Check the store of *bench*."""
        with Trial(bench, (getdoc(self._check) or "").partition("\n")[0]) as trial:
            self._check(trial)


def store_contract(bench: type[StoreBench] | StoreBench) -> list[StoreCheck]:
    """Return the checks that a store has to pass before its answers can be believed.

    With pytest::

        @pytest.mark.parametrize("check", store_contract(AccountsBench), ids=str)
        def test_the_store_of_accounts(check):
            check(AccountsBench())

    They take about ten seconds. With a server they break connections, by a proxy between the store and the server: the
    store's driver must wait in gevent's way.

    Args:
        bench: Your class, or a bench. Checks that it has nothing for are left out: of broken connections without
            ``save_marker``, of constraints without ``violate``, of batches side by side if ``max_batches`` is 1.

    Raises:
        TypeError: *bench* is no `StoreBench`, or has only one of ``load_marker`` and ``save_marker``.
    Switches: no.
    """
    from geventbatch.testing import _store_breaks, _store_checks

    owner = bench if isinstance(bench, type) else type(bench)
    if not issubclass(owner, StoreBench):
        raise TypeError(f"store_contract takes a StoreBench or a class derived from it, not {bench!r}")
    if bool(bench.load_marker) != bool(bench.save_marker):
        raise TypeError(f"{owner.__name__} needs both load_marker and save_marker, or neither of them")
    checks = [*_store_checks.ALWAYS]
    if bench.max_batches > 1:
        checks += _store_checks.SIDE_BY_SIDE
    if owner.violate is not StoreBench.violate:
        checks += _store_checks.CONSTRAINTS
    if bench.save_marker:
        checks += _store_breaks.BREAKS
    return [StoreCheck(check.__name__, check) for check in checks]
