"""What a profile found: all that `profile.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..model.blocks import PRECISIONS


@dataclass
class Row:
    """One hot path; everything per step."""

    name: str
    seconds: float
    share: float
    """of the time inside operators (CPU) or kernels (GPU)"""
    calls: float
    bytes: float
    """that must move, by formula; 0: not counted"""
    flops: float
    peak: int
    """bytes above the start of the step while this ran, at the highest"""
    of_copy: float
    """bytes/s over the measured copy bandwidth"""
    of_matmul: float
    """FLOP/s over the measured matmul rate"""

    @property
    def path(self) -> str:
        """Its name, whatever the backend."""
        return self.name.rpartition("/")[0] or self.name


@dataclass
class Report:
    """What one backend's steps took."""

    backend: str
    rows: list[Row]
    wall: float
    """seconds of a step without a profiler, median"""
    coverage: float
    """share of the time inside operators or kernels that is inside named ranges too"""
    unnamed: dict[str, float]
    """operator or kernel -> seconds per step outside of them"""
    peak: int
    """bytes above the start of a step, at the highest"""
    resident: int
    """bytes that stay between steps: parameters, teacher, optimizer"""


@dataclass
class Profile:
    """All that `profile.json` holds."""

    preset: str
    shape: tuple[int, ...]
    """of the source of one step"""
    unit: str
    precision: str
    compile: bool
    cuda_graph: bool
    """of the timed steps; the traced ones are plain, for a replay has no ranges"""
    device: str
    steps: int
    model_flops: int
    """of a step, as the original computes it (flops.step_flops)"""
    rates: dict[str, float]
    """"copy" in bytes/s, FLOP/s of a matrix product under each dtype"""
    reports: list[Report]
    """the backend asked for; then the one it is held against"""
    environment: dict[str, Any] = field(repr=False)

    @property
    def matmul(self) -> float:
        """Measured FLOP/s of a matrix product in the step's precision."""
        return self.rates[str(PRECISIONS[self.precision])]
