"""Calls that do what they are asked for, but without end, such as ten to the fifteen steps."""

import contextlib
import signal
from collections.abc import Iterator

SECONDS = 20


class AtWork(BaseException):
    """A call is still at work after `SECONDS`."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """AtWork in the block after `SECONDS`, whatever else is caught in it."""
    before = signal.signal(signal.SIGALRM, _end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _end(*_: object) -> None:
    raise AtWork
