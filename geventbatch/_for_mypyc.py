"""What stands between `_core`, which may be compiled, and what is not."""

from __future__ import annotations

from functools import update_wrapper
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: object) -> Callable[[type], type]:
        """Stand for that of mypy_extensions, which only mypy needs."""
        return lambda owner: owner


__all__ = ["defined_by", "mypyc_attr"]

F = TypeVar("F", bound="Callable[..., object]")


def defined_by(method: Any) -> Callable[[F], F]:
    """Put *method* in the place of a function that says its types and what it does.

    A method that calls the other one would cost each operation another frame. A compiled method keeps no docstring.
    """

    def define(function: F) -> F:
        if isinstance(method, FunctionType):
            del update_wrapper(method, function).__wrapped__
        return cast("F", method)

    return define
