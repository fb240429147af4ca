"""The progress bar of a draw: how far down the flow the current batch is, the level reached and the calls made."""

from types import TracebackType

from tqdm import tqdm

from pfgm.sampling.sampler import Sampler


class DrawProgress:
    """A bar over `total` samples, as a context manager.

    It is the `on_call` of a Sampler: `batch(size)` announces the next batch, calls move the bar by its share of the way from
    sigma_max to the level that is denoised.
    """

    def __init__(self, total: int, sampler: Sampler, show: bool):
        self.bar = tqdm(total=total, unit=" samples", disable=not show, dynamic_ncols=True)
        self.path = sampler.solver.coordinates(sampler.sigma_data)
        self.start, self.end = self.path.time(sampler.sigma_max), self.path.time(sampler.last_level)
        self.done, self.size = 0, 0

    def batch(self, size: int) -> None:
        """The samples announced so far are done, `size` more begin."""
        self.done += self.size
        self.size = size

    def __call__(self, calls: int, level: float) -> None:
        fraction = (self.path.time(level) - self.start) / (self.end - self.start)
        self.bar.n = round(self.done + self.size * min(1.0, fraction), 1)
        self.bar.set_postfix(level=f"{level:.3g}", calls=calls)

    def __enter__(self) -> "DrawProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
