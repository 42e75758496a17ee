"""Tools at the border between `_core`, which may be compiled, and the modules that are not."""

from __future__ import annotations

from functools import update_wrapper
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_: object) -> Callable[[type], type]:
        """Stand for the function of mypy_extensions, which only mypy needs."""
        return lambda owner: owner


__all__ = ["defined_by", "mypyc_attr"]

F = TypeVar("F", bound="Callable[..., object]")


def defined_by(method: Any) -> Callable[[F], F]:
    """Put *method* in the place of a function that has only its types and its docstring.

    If the function called *method* instead, each operation would cost another frame. A compiled method keeps no
    docstring.
    """

    def define(function: F) -> F:
        if isinstance(method, FunctionType):
            del update_wrapper(method, function).__wrapped__
        return cast("F", method)

    return define
