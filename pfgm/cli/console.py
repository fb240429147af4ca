"""How commands end: results on stdout, errors as one line on stderr, and an exit code.

0    done
1    a defect of this package; --debug shows the traceback
2    a wrong argument, an unusable file, too little memory, or a training loss that is not finite; repeating does not help
75   another process of the same run was lost; the same command continues
130, 138, 143    stopped by Ctrl-C, SIGUSR1 or SIGTERM; the same command continues
141  the reader of the output has gone; files are whole
"""

import os
import re
import signal
import sys
import threading
from argparse import ArgumentError
from collections.abc import Callable, Sequence

import torch

from pfgm.core.exits import LOST, LostProcess, exit_for_signal, exit_with
from pfgm.sampling.ode import SolverError

# Errors whose message names the argument and the remedy.
ERRORS: tuple[type[Exception], ...] = (ArgumentError, ValueError, OSError, ImportError, SolverError)
# jsonargparse reports a value that fits no type of a union in many lines, and its errors have no attributes to take instead.
UNION = "Does not validate against any of the Union"
SHORTER = (
    (r"<class '([^']*)'>", r"\1"),
    (
        UNION + r" subtypes Subtypes: \[([^\]]*)\] Errors: (?:- Expected an? \S+ )+Given value type: \S+ Given value: ",
        r"Expected one of [\1]. Got value: ",
    ),
    (UNION + r" subtypes Subtypes: \[[^\]]*, NoneType\] Errors: - ", ""),
    (r" - Expected a NoneType Given value type: .*", ""),
)
NO_MEMORY = r"can't allocate memory|not enough memory|Storage size calculation overflowed"  # torch's words


def run(
    program: str, command: Callable[[list[str]], object], words: Sequence[str], errors: tuple[type[Exception], ...] = ()
) -> None:
    """Run a command, and end as described above.

    Args:
        program: What messages call it.
        command: Takes the words.
        words: The words after the command; --debug among them shows tracebacks instead of messages.
        errors: Further errors whose message is for the user.
    """
    words, debug = [word for word in words if word != "--debug"], "--debug" in words
    _open_streams()
    if debug:
        command(words)
        return
    main = threading.current_thread() is threading.main_thread()
    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, exit_for_signal) for number in heard}
    try:
        command(words)
        _flush(program)
    except KeyboardInterrupt:  # of a thread, or of a library
        exit_for_signal(signal.SIGINT)
    except Exception as error:
        exit_with(*_message(program, error, errors))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_streams() -> None:
    """Redirect closed streams to os.devnull, and backslash-escape characters that the terminal cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the life of the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush(program: str) -> None:
    """Report output that cannot be written; the work is done by then."""
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        exit_with(f"{program}: done, but its output cannot be written: {error.strerror}", 2)


def _message(program: str, error: Exception, errors: tuple[type[Exception], ...]) -> tuple[str, int]:
    """Return the message for an error, and the exit code."""
    if is_memory_error(error):
        wanted = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        return (
            f"{program}: error: out of memory{f' ({wanted[0]})' if wanted else ''}; give a smaller batch_size (in training, "
            "trainer.accumulate_grad_batches makes up for it), fewer samples, or a smaller network"
        ), 2
    if isinstance(error, (*ERRORS, *errors)):
        return f"{program}: error: {_one_line(_cause(error))}", 2
    if isinstance(error, OverflowError):
        return f"{program}: error: a number is too large ({error}); give one of 64 bits", 2
    if isinstance(error, LostProcess):
        return f"{program}: {error}", LOST
    return f"{program}: {type(error).__name__}: {_one_line(error)}. This is a defect of pfgm: please report it, with --debug", 1


def is_memory_error(error: BaseException) -> bool:
    """Return whether memory ran out, on this machine or on a GPU; torch has no class for the first."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    for pattern, words in SHORTER:
        text = re.sub(pattern, words, text)
    return text


def _cause(error: Exception) -> Exception:
    """Return the error of this package behind one that jsonargparse wraps for a union of types."""
    while isinstance(error.__cause__, Exception) and str(error).startswith(UNION):
        error = error.__cause__
    return error
