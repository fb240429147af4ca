"""Train a Poisson flow: python train.py fit --config configs/digits.yaml (starts, and resumes when repeated)."""

from pfgm.cli import run

if __name__ == "__main__":
    run()
