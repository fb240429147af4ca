"""Exit codes, and how a process ends for a signal."""

import signal
import sys

LOST = 75
"""The exit code for `LostProcess`: EX_TEMPFAIL of sysexits.h."""


class LostProcess(RuntimeError):
    """A process that this one works with has ended before it."""


def end(number: int, frame: object = None) -> None:
    """End the process for a signal, with its exit code; Lightning has one of its own for KeyboardInterrupt."""
    exit_with(
        f"stopped by {signal.Signals(number).name}; files are whole, and the same command continues a run or a folder",
        128 + number,
    )


def exit_with(text: str, code: int) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)
