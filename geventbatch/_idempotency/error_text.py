"""Errors as text, the same in every process. They are restored without a call of `__init__`, and without pickle.

Each text is decoded at once and compared with the error. So a recorded error can always be raised again.
"""

from __future__ import annotations

import sys
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final

from geventbatch._idempotency.value_text import decode, encode, found_at, path_of

_OF_THE_RAISE: Final = frozenset(
    {
        "args",
        "__traceback__",
        "__context__",
        "__cause__",
        "__suppress_context__",
        "__dict__",
        "__weakref__",
        "__class__",
    }
)
"""Members of an exception that are recorded apart, or that depend on the place where it was raised."""


def encode_error(error: BaseException, kinds: tuple[type[BaseException], ...]) -> str:
    """Return *error*, one of *kinds*, as one line of ASCII. Raise any error, if *error* cannot be recorded."""
    path = path_of(type(error))
    if _is_validation_error(type(error)):
        text = encode([path, _validation_parts(error), _beside(error)])
        if _state(decode_error(text, kinds)) != _state(error):
            raise TypeError(f"a {path} like this one would not come back as it is")
        return text
    parts = [path, error.args, _attributes(error)]
    text = encode(parts)
    made = decode_error(text, kinds)
    members = {name: value for name, value in _members(error).items() if _members(made).get(name) is not value}
    lost = {name: value for name, value in members.items() if encode(value) != encode(_members(made).get(name))}
    if lost:
        text = encode([*parts, lost])
        made = decode_error(text, kinds)
    if _state(made) != _state(error):
        raise TypeError(f"a {path} like this one would not come back as it is")
    return text


def decode_error(text: str, kinds: tuple[type[BaseException], ...]) -> BaseException:
    """Return the error that `encode_error` has made *text* of. Raise any error, if the text does not fit (any more)."""
    path, *parts = decode(text)
    if len(parts) == 1:  # a record of an earlier format
        raise ValueError("it had arguments that cannot be recorded")
    kind = found_at(path)
    if not (isinstance(kind, type) and issubclass(kind, kinds)):
        raise TypeError(f"{path} is not among recorded_errors")
    if _is_validation_error(kind):
        return _validation_error(kind, *parts)
    args, attributes, *members = parts
    error: BaseException = kind.__new__(kind, *args)  # no __init__: it may take other arguments than `args`
    error.args = args
    error.__dict__.update(attributes)
    for name, value in members[0].items() if members else ():
        setattr(error, name, value)
    return error


def _attributes(error: BaseException) -> dict[str, Any]:
    return {name: value for name, value in error.__dict__.items() if name != "__notes__"}


def _members(error: BaseException) -> dict[str, Any]:
    """Return the values of its ``__slots__``, and of the members that classes written in C keep beside `args`."""
    found: dict[str, Any] = {}
    for kind in reversed(type(error).__mro__[:-1]):  # without `object`
        for name, member in vars(kind).items():
            if isinstance(member, (MemberDescriptorType, GetSetDescriptorType)) and name not in _OF_THE_RAISE:
                try:
                    found[name] = member.__get__(error)
                except AttributeError:  # it was never set
                    continue
    return found


def _state(error: BaseException) -> tuple[Any, ...]:
    """Return the state that must be equal of an error and its decoded text."""
    if _is_validation_error(type(error)):
        return type(error), encode(_validation_parts(error)), encode(_beside(error))
    return type(error), encode(error.args), encode(_attributes(error)), encode(_members(error))


# -- Django's ValidationError, which refers to itself, or to many others -------------------------------------------

_OF_VALIDATION: Final = frozenset({"message", "code", "params", "error_list", "error_dict", "__notes__"})


def _is_validation_error(kind: type) -> bool:
    exceptions: Any = sys.modules.get("django.core.exceptions")
    return exceptions is not None and issubclass(kind, exceptions.ValidationError)


def _validation_parts(error: Any) -> list[Any]:
    if hasattr(error, "error_dict"):
        return ["dict", [[field, [_one(each) for each in those]] for field, those in error.error_dict.items()]]
    if hasattr(error, "message"):
        return ["one", _one(error)]
    return ["list", [_one(each) for each in error.error_list]]


def _one(error: Any) -> list[Any]:
    """Return message, code and parameters. A lazy message is translated now, in the language of the first caller."""
    if not hasattr(error, "message"):
        raise TypeError("a list of errors in a list of errors")
    message = error.message
    if isinstance(message, sys.modules["django.utils.functional"].Promise):
        message = str(message)
    return [message, error.code, error.params]


def _beside(error: Any) -> dict[str, Any]:
    return {name: value for name, value in error.__dict__.items() if name not in _OF_VALIDATION}


def _validation_error(kind: Any, parts: list[Any], beside: dict[str, Any]) -> BaseException:
    base: Any = sys.modules["django.core.exceptions"].ValidationError
    form, encoded = parts
    if form == "dict":
        given: tuple[Any, ...] = ({field: [base(*each) for each in those] for field, those in encoded},)
    else:
        given = tuple(encoded) if form == "one" else ([base(*each) for each in encoded],)
    error: BaseException = kind.__new__(kind, *given)
    base.__init__(error, *given)
    error.__dict__.update(beside)
    return error
