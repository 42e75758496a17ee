"""What the log of a server may say on a busy machine, and what it may not."""

import re

_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


def unexpected(logged: str) -> list[str]:
    """The messages behind which a traceback stands, but for batches that a busy machine gave no time, or no turn.

    On SQLite no row is locked: a process that gets little of a busy machine can lose all its rounds to another one.
    PostgreSQL ends a statement shortly before the deadline.
    """
    lines = [line for line in logged.splitlines() if line.strip()]
    messages = [before for before, line in zip(["", *lines], lines, strict=False) if "Traceback (most recent" in line]
    return [
        message
        for message in messages
        if message not in _CHAINED
        and not re.search(r"raised Conflict\(|max_duration|due to statement timeout", message)
    ]
