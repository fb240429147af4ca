"""Exit codes, and ending the process with one."""

import signal
import sys

LOST = 75  # exit code for `LostProcess`: EX_TEMPFAIL of sysexits.h


class LostProcess(RuntimeError):
    """Another process of the same run has ended before this one."""


def exit_for_signal(number: int, frame: object = None) -> None:
    """Handle a signal by ending the process with exit code 128 + `number`; Lightning's handlers have codes of their own."""
    name = signal.Signals(number).name
    exit_with(f"stopped by {name}; files are whole, and the same command continues a run or a folder", 128 + number)


def exit_with(text: str, code: int) -> None:
    """Print `text` to stderr and end the process with exit code `code`."""
    print(text, file=sys.stderr)
    sys.exit(code)
