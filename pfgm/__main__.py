"""Run `python -m pfgm` as the command `pfgm`."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries are imported ends at once
    from pfgm.cli.main import main

    main()
