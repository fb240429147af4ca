"""Show the progress of sampling."""

from tqdm import tqdm

from pfgm.sampling.sampler import Sampler


class SamplingProgress:
    """Show finished samples, current noise level and network calls; a context manager.

    Pass the object as `on_call` of a Sampler. Announce each batch by `batch(size)`, within which the bar advances with the time
    of the sampler's coordinates.
    """

    def __init__(self, total: int, sampler: Sampler, show: bool):
        self.bar = tqdm(total=total, unit=" samples", disable=not show, dynamic_ncols=True)
        self.path = sampler.coordinates
        self.start, self.end = self.path.time(sampler.sigma_max), self.path.time(sampler.last_level)
        self.done, self.size = 0, 0

    def batch(self, size: int) -> None:
        """Count the previous batch as finished and begin one of `size` samples."""
        self.done += self.size
        self.size = size

    def __call__(self, calls: int, level: float) -> None:
        fraction = (self.path.time(level) - self.start) / (self.end - self.start)
        self.bar.n = round(self.done + self.size * min(1.0, fraction), 1)
        self.bar.set_postfix(level=f"{level:.3g}", calls=calls)

    def __enter__(self) -> "SamplingProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
