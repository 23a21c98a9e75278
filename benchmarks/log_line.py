"""What the ranks of a log line cost: `d2v.train.health.effective_rank` beside the singular values it stands
for.

    OMP_NUM_THREADS=1 python -m benchmarks.log_line [--device cuda] [--rounds 9]

Both take turns in one process; medians in ms of one rank, and how far the two ranks are apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from d2v.train.health import effective_rank

SHAPES = ((512, 1024), (512, 768), (150, 768), (512, 96), (512, 64))
"""rows [n, D] of large, base and tiny presets, and of the whole tokens of two short utterances"""


def rank_of_svd(rows: Tensor) -> Tensor:
    """The same rank by singular values, in fp64 on the CPU."""
    centred = rows.detach().cpu().double()
    scale = centred.abs().amax()
    values = torch.linalg.svdvals(centred - centred.mean(dim=0))
    values = values[values > 1e-7 * scale * max(centred.shape) ** 0.5]
    return torch.special.entr(values / values.sum()).sum().exp()


def timed(rank: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[float, float]:
    """Seconds until the rank is on the host, and the rank."""
    began = time.perf_counter()
    found = rank(rows).item()
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_line", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for n, d in SHAPES:
        rows = torch.randn(n, d, device=given.device) * torch.logspace(0, -2, d, device=given.device)
        seconds: dict[str, list[float]] = {"svd": [], "gram": []}
        for _ in range(given.rounds + 1):
            spent, expected = timed(rank_of_svd, rows)
            seconds["svd"].append(spent)
            spent, found = timed(effective_rank, rows)
            seconds["gram"].append(spent)
        svd, gram = (1e3 * statistics.median(some[1:]) for some in seconds.values())
        print(f"{n:>4} x {d:<4} svd {svd:7.2f} ms  gram {gram:6.2f} ms  {svd / gram:5.1f} times faster  "
              f"rank {found:.2f}, {abs(found / expected - 1):.0e} apart")  # fmt: skip


if __name__ == "__main__":
    main()
