"""Draw samples from a trained Poisson flow: python sample.py CHECKPOINT --n 64 --out samples.png"""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries are imported ends at once
    from pfgm.cli.main import sample

    sample()
