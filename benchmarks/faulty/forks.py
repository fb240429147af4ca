"""Processes that start in milliseconds: forked from one that has imported everything and has no threads."""

import functools
import multiprocessing
import os
from multiprocessing.context import ForkServerContext

PRELOAD = ["pfgm.cli.train", "pfgm.cli.main", "matplotlib.figure", "torchvision.utils", "sklearn.model_selection"]
PRELOAD += [f"benchmarks.faulty.{name}" for name in ("kills", "draws", "hostile_models", "hostile_data", "strangers")]


@functools.cache
def forks() -> ForkServerContext:
    """The context to start them with; the server is ready when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    return context
