"""Time of a draw over the time of the bare network calls that it makes.

    python benchmarks/overhead.py [--batch 64 --pairs 7] [--device cuda]

Each pair times one draw and, right after it, as many calls of the same network on one input; the median of the pairs'
ratios is printed, for ab3 and adaptive_heun, with networks of several sizes on 1 x 8 x 8 and 3 x 32 x 32 images.
"""

import argparse
import statistics
import time

import torch

from pfgm.flow.poisson_flow import PoissonFlow
from pfgm.nn import UNet
from pfgm.nn.preconditioning import PreconditionedDenoiser
from pfgm.theory.data_summary import DataSummary

SIZES = (((1, 8, 8), 32, (1, 2), 1), ((1, 8, 8), 64, (1, 2), 2), ((3, 32, 32), 48, (1, 2), 1))
SOLVERS = ({"method": "ab3", "steps": 8}, {"method": "adaptive_heun", "rtol": 0.05, "atol": 0.05})


def clock(device: torch.device) -> float:
    """Now, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()
    n, device = arguments.batch, arguments.device
    print("| network | solver | calls | draw | bare calls | ratio |\n|---|---|---|---|---|---|")
    for shape, width, multipliers, blocks in SIZES:
        torch.manual_seed(0)
        net = UNet(shape, width=width, multipliers=multipliers, blocks=blocks)
        torch.nn.init.normal_(net.last[-1].weight, std=0.02)
        flow = PoissonFlow(PreconditionedDenoiser(net, 128.0, 0.5, 0.06), DataSummary(shape), sigma_min=0.01, sigma_max=40.0)
        flow = flow.to(device).eval()
        x, c_noise = torch.randn(n, *shape, device=device), torch.zeros(n, device=device)
        for solver in SOLVERS:
            times = []
            for k in range(arguments.pairs + 1):
                began = clock(device)
                out = flow.sample(n, seed=k, batch_size=n, **solver)
                middle = clock(device)
                with torch.no_grad():
                    for _ in range(out.calls):
                        net(x, c_noise)
                times.append((middle - began, clock(device) - middle))
            draw, bare = (statistics.median(part) for part in zip(*times[1:], strict=True))
            ratio = statistics.median(a / b for a, b in times[1:])
            size = f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, {shape}"
            print(f"| {size} | {solver['method']} | {out.calls} | {draw:.3f} s | {bare:.3f} s | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
