"""Misspelt names on a user's store or scope: they are nearly a name that we ask for, and so do nothing."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gevent import getcurrent

from geventbatch._core import process
from geventbatch._watch.problem import SetupProblem, warn
from geventbatch._wrapper import Around, innermost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


_NEAR: Final = 0.87
"""The similarity from which a name counts as misspelt: `take_rows` and `normaliseKey` do, `normalize` does not."""

_WORDS: Final = frozenset({"save", "step", "reuse", "open_resource"})
"""Names near to ours that a class may well have for itself."""


def misspelt(given: Any, *, scope: bool) -> Iterator[tuple[str, str]]:
    """Iterate over the misspelt names of *given*, a scope or else a store, each with the right name."""
    given = innermost(given)
    own = _own(given)
    if not own:
        return
    from difflib import get_close_matches  # only now, as the protocols: no store that comes with the library needs them

    asked = _asked(scope=scope)
    has = {name for name in asked if inspect.getattr_static(given, name, None) is not None}
    lacks = {_plain(name): name for name in asked if name not in has}
    for name, value in own.items():
        if name in asked or name in _WORDS:
            continue
        for near in get_close_matches(_plain(name), lacks, n=1, cutoff=_NEAR):
            right = lacks[near]
            is_function = callable(value) or isinstance(value, (staticmethod, classmethod))
            if is_function is asked[right] and ("_" in right or has):  # a name of one word may have another meaning
                yield name, right


def problem_of(given: Any, *, scope: bool) -> SetupProblem | None:
    """Return the problem of misspelt names on a scope, or else a store; None if there are none."""
    found = dict(misspelt(given, scope=scope))
    if not found:
        return None
    kind = type(innermost(given)).__qualname__
    names = ", ".join(f"{name} (did you mean {right}?)" for name, right in found.items())
    return SetupProblem(
        "misspelt",
        f"The {'scope' if scope else 'store'} {kind} has {names}, which nothing asks for.",
        "Rename it; geventbatch.scopes has a protocol with each name, for type checkers. Let names of your own begin "
        "with an underscore.",
    )


class FirstLook(Around):
    """Wraps an ``open_resource`` or ``open_resources``, looks at its first scope, and then takes itself away."""

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        """Wrap *inner*, which is the user's function."""
        super().__init__(inner)
        self.__wrapped__ = inner
        # -- mutable state ---------------------------------------------------------------------------------
        self._looked = False

    def __call__(self, asked: Any) -> Any:
        """Open the resource at a key, or the resources at several keys."""
        scope = self._inner(asked)
        if not self._looked:
            self._looked = True
            problem = problem_of(scope, scope=True)
            if problem is not None:
                warn(problem)
        self._leave()
        return scope

    def _leave(self) -> None:
        # The options are frozen for all others. If a test tool has wrapped us, we leave once its wrapper is gone.
        options: Any = process.running[getcurrent()].dispatcher.options
        if options.open_resource is self:
            object.__setattr__(options, "open_resource", self._inner)
        elif options.open_resources is self:
            from geventbatch._bulk.scopes import OneOfBulk  # imported by now

            object.__setattr__(options, "open_resources", self._inner)
            object.__setattr__(options, "open_across", self._inner)
            object.__setattr__(options, "open_resource", partial(OneOfBulk, self._inner))
        elif options.open_across is self:
            object.__setattr__(options, "open_across", self._inner)


def first_look(opener: Any) -> Any:
    """Return *opener* in a `FirstLook`; itself, if it is a store of ours."""
    kinds = type(innermost(opener)).__mro__
    return opener if any(kind.__module__.startswith("geventbatch.") for kind in kinds) else FirstLook(opener)


def _own(given: Any) -> dict[str, Any]:
    """Return the public attributes of *given* by its user's classes; none if a ``__getattr__`` may have more."""
    kinds = [kind for kind in type(given).__mro__ if not _is_ours(kind)]
    if not kinds or inspect.getattr_static(type(given), "__getattr__", None) is not None:
        return {}
    try:
        found: Mapping[str, Any] = object.__getattribute__(given, "__dict__")
    except AttributeError:
        found = {}
    parts = [vars(kind) for kind in reversed(kinds)]
    return {name: value for part in (*parts, found) for name, value in part.items() if not name.startswith("_")}


def _is_ours(kind: type) -> bool:
    """Return whether *kind* is the library's or Python's, not a user's."""
    top = kind.__module__.partition(".")[0]
    return top == "geventbatch" or top in sys.stdlib_module_names


def _asked(*, scope: bool) -> dict[str, bool]:
    """Return the names that we ask for, and whether each is a function."""
    from geventbatch import scopes

    protocols = scopes.OF_A_SCOPE if scope else scopes.OF_A_STORE
    found: dict[str, bool] = {
        name: inspect.isfunction(value)
        for protocol in protocols
        for name, value in vars(protocol).items()
        if not name.startswith("_")
    }
    return found if scope else found | {"open_resources": False}


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
