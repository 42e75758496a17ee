"""Accounts as virtual objects of Restate, for `benchmarks.durable`."""

from __future__ import annotations

from typing import Any

import restate

accounts = restate.VirtualObject("Account")


async def add(context: Any, amount: int) -> int:
    """Change the object, and return what it has then."""
    value: int = (await context.get("value") or 0) + amount
    if amount:
        context.set("value", value)
    return value


async def pay(context: Any, target: str) -> int:
    """Give one to another object. Two who pay each other at once wait for ever, as Restate's documentation warns."""
    await add(context, -1)
    value: int = await context.object_call(add_of_another, key=target, arg=1)
    return value


add_of_another = accounts.handler("add")(add)
accounts.handler("pay")(pay)
app = restate.app([accounts])
