"""How commands end: results on stdout, errors as one line on stderr, and an exit code.

0    done
1    a defect of this package; --debug shows the traceback
2    a wrong argument, an unusable file, too little memory or a training loss that is not finite; repeating does not help
75   another process of the same run was lost; the same command continues
130, 138, 143    stopped by Ctrl-C, SIGUSR1 or SIGTERM; the same command continues
141  the reader of the output has gone; the files written are complete
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

# Errors whose message is written for the user: it names the argument and the remedy.
ERRORS: tuple[type[Exception], ...] = (ArgumentError, ValueError, OSError, ImportError, SolverError)
# Messages of torch's RuntimeError when the machine, not a GPU, has too little memory.
TOO_LITTLE_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
UNION = "Does not validate against any of the Union subtypes"


def run(
    program: str, command: Callable[[list[str]], object], words: Sequence[str], errors: tuple[type[Exception], ...] = ()
) -> None:
    """Call `command` with `words` and end the process with a line and an exit code if it fails.

    Args:
        program: The name that messages begin with.
        command: What to run. It gets `words` without --debug, which shows tracebacks instead of lines.
        words: Arguments from the command line.
        errors: Classes of errors besides ERRORS whose message is written for the user.
    """
    words, debug = [word for word in words if word != "--debug"], "--debug" in words
    _open_streams()
    if debug:
        command(words)
        return
    main = threading.current_thread() is threading.main_thread()
    handled = [number for number in (signal.SIGTERM, signal.SIGINT) if main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, exit_for_signal) for number in handled}
    try:
        command(words)
        _flush(program)
    except KeyboardInterrupt:  # raised in a thread, or by a library
        exit_for_signal(signal.SIGINT)
    except Exception as error:
        exit_with(*_message_and_code(program, error, errors))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_streams() -> None:
    """Redirect closed streams to os.devnull and backslash-escape characters that the terminal cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush(program: str) -> None:
    """Flush stdout and say if the output, of work that is done by then, cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        exit_with(f"{program}: done, but its output cannot be written: {error.strerror}", 2)


def _message_and_code(program: str, error: Exception, errors: tuple[type[Exception], ...]) -> tuple[str, int]:
    if is_out_of_memory(error):
        size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        return (
            f"{program}: error: out of memory{f' ({size[0]})' if size else ''}. Use a smaller batch_size (in training, "
            "trainer.accumulate_grad_batches makes up for it), fewer samples, or a smaller network."
        ), 2
    if isinstance(error, ArgumentError):
        return f"{program}: error: {parser_message(error)}", 2
    if isinstance(error, (*ERRORS, *errors)):
        return f"{program}: error: {_one_line(error)}", 2
    if isinstance(error, OverflowError):
        return f"{program}: error: a number is too large ({error}). Pass one that fits in 64 bits.", 2
    if isinstance(error, LostProcess):
        return f"{program}: {error}", LOST
    line = f"{program}: {type(error).__name__}: {_one_line(error)}. This is a defect of pfgm: please report it, with --debug"
    return line, 1


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that this machine or a GPU has too little memory; torch has a class only for GPUs."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in TOO_LITTLE_MEMORY)
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def parser_message(error: BaseException) -> str:
    """Return the message of jsonargparse's `error` in one line.

    jsonargparse chains its errors: each ends with the text of its cause, except that one about a union lists what every type
    of the union says. The line keeps what each error adds to its cause, and of a union of classes only what the first says.
    """
    added = ""
    while isinstance(cause := error.__cause__, Exception):
        text, inner = _one_line(error), _one_line(cause)
        if text.startswith(UNION) and cause.__cause__ is None:  # plain types, such as [int, NoneType]
            types = text.partition("Subtypes: ")[2].partition(" Errors: ")[0]
            return _plain(f"{added}Expected one of {types}. Got value: {text.rpartition('Given value: ')[2]}")
        if not text.startswith(UNION):
            if not text.endswith(inner):
                break
            added += text.removesuffix(inner)
        error = cause
    return _plain(added + _one_line(error))


def _plain(text: str) -> str:
    return text.replace("<class '", "").replace("'>", "")
