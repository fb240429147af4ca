"""How fast images come: read from a set, made into batches in memory, brought into a training step.

python benchmarks/data.py images.zip --size 32     (any path that pfgm.data.ImageDataModule takes)
"""

import argparse
import itertools
import statistics
import time

import torch
from torch.utils.data import DataLoader

from pfgm.data import ImageDataModule
from pfgm.data.batches import TrainingStream
from pfgm.nn import UNet
from pfgm.training.losses import DenoisingLoss
from pfgm.training.module import PFGM


def rate(batches, count, use):
    """Images a second of `count` batches, the median of five runs."""
    rates = []
    for _ in range(5):
        start, images = time.perf_counter(), 0
        for batch in itertools.islice(batches, count):
            use(batch)
            images += len(batch.x)
        rates.append(images / (time.perf_counter() - start))
    return statistics.median(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    size, workers = arguments.size, arguments.workers
    start = time.perf_counter()
    data = ImageDataModule(arguments.path, size=size, batch_size=arguments.batch_size, flip=True)
    data.setup()
    count = len(data.train) + len(data.held_out)
    seconds = time.perf_counter() - start
    print(f"{count} images of {data.shape}: read, checked and measured in {seconds:.1f} s, {count / seconds:.0f} images/s")
    pinned = arguments.device == "cuda"

    def loader(data, workers, reference_size=0):
        options = {"batch_size": arguments.batch_size, "seed": 0, "start": 0, "reference_size": reference_size}
        stream = TrainingStream(data.train, data.augmentation, **options)
        return iter(DataLoader(stream, batch_size=None, pin_memory=pinned, num_workers=workers))

    device = torch.device(arguments.device)
    flow = PFGM(UNet(data.shape, width=8, blocks=1), data.summary, loss=DenoisingLoss()).flow.to(device)

    def on_device(batch):
        """What a training step does with a batch before noise and network: bring it over, and into model space."""
        return flow.to_model(batch.x.to(device, non_blocking=pinned).float())

    print(
        f"in memory, mirrored, batches of {arguments.batch_size}: {rate(loader(data, 0), 40, len):.0f} images/s; "
        f"into the step, in model space: {rate(loader(data, 0), 40, on_device):.0f} images/s"
    )
    charges = rate(loader(data, 0, 4096), 10, on_device)
    print(f"the same with 4096 charges a step (PFGM): {charges:.0f} images/s")
    images = ImageDataModule(arguments.path, size=size, batch_size=arguments.batch_size, flip=True, memory=0)
    batches = loader(images, workers)
    rate(batches, 1, on_device)
    print(f"from the disk by {workers} workers, into the step: {rate(batches, 6, on_device):.0f} images/s")


if __name__ == "__main__":
    main()
