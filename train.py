"""Train a Poisson flow: python train.py fit --config configs/digits.yaml (starts, and resumes when repeated)."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries are imported ends at once
    from pfgm.cli.train import run

    run()
