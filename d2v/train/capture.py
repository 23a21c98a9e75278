"""Which steps of a run Nsight Systems captures: `d2v train ... --profile nsys --profile-steps 10:20`.

benchmarks/nsys.sh runs that under nsys; `d2v.tools.nsys` reads what it reports.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


INJECTED = ("NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH")
"""environment variables that nsys or ncu set in what they launch"""


def parse_steps(text: str) -> tuple[int, int]:
    """`10:20` as (10, 20): capture from when 10 steps are done until 20 are."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    start, stop = map(int, match.groups()) if match else (0, 0)
    if not start < stop:
        raise ValueError(
            f"train: --profile-steps must be START:STOP with 0 <= START < STOP (10:20), got {text!r}"
        )
    return start, stop


class Capture:
    """Brackets the steps after `steps[0]` up to `steps[1]` with cudaProfilerStart and cudaProfilerStop.

    steps: as `parse_steps` returns them; None: nothing is captured and every call does nothing.
    In its context every range is open to see, captured or not, so that a compiled step or a CUDA graph is the
    same throughout; leaving it stops a capture that is still on. Raises ValueError without a CUDA device.
    """

    def __init__(self, steps: tuple[int, int] | None, device: torch.device) -> None:
        if steps is not None and device.type != "cuda":
            raise ValueError(f"train: --profile nsys needs a CUDA device, this run is on {device}")
        self.steps, self.device = steps, device
        self.on = False
        self._ranges: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> Capture:
        if self.steps is not None:
            from d2vkern._nvtx import force_ranges

            self._ranges = force_ranges(True)
        self._ranges.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self.on:
                self._switch()
        finally:
            self._ranges.__exit__(*error)

    def check(self, done: int, total: int) -> str | None:
        """A warning when nobody listens. ValueError when the run from `done` to `total` lacks the steps."""
        if self.steps is None:
            return None
        start, stop = self.steps
        if start < done or stop > total:
            raise ValueError(
                f"train: --profile-steps must lie within this run's steps {done}:{total}, got {start}:{stop}"
            )
        if any(name in os.environ for name in INJECTED):
            return None
        return "--profile nsys without nsys: nothing is recorded; start the run with benchmarks/nsys.sh"

    def reach(self, done: int) -> None:
        """Say that `done` steps are done: starts or stops the capture where that is due."""
        if self.steps is not None and done == self.steps[self.on]:
            self._switch()

    def _switch(self) -> None:
        """On or off, between kernels."""
        import torch.cuda.profiler

        torch.cuda.synchronize(self.device)
        if self.on:
            torch.cuda.profiler.stop()
        else:
            torch.cuda.profiler.start()
        self.on = not self.on
