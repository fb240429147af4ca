"""What no file may bring to run: it leaves a canary."""

from pathlib import Path

Path("canary").touch()


class Net:
    """Named by a file; never made."""
