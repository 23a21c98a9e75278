"""The command `d2v demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from .parse import UsageError, parse


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Pretrain and probe the three tiny presets on embedded data: about 10 minutes on two CPU cores."""

    out: Annotated[str, arg(metavar="FOLDER")] = "runs/demo"
    """folder for the three runs, summary.json and plots"""
    minutes_scale: float = 1.0
    """factor on the length of each run"""


def demo(arguments: Sequence[str]) -> int:
    """See `DemoOptions`."""
    given = parse(DemoOptions, arguments, "demo")
    if not given.minutes_scale > 0:
        raise UsageError(f"d2v demo: --minutes-scale must be positive, got {given.minutes_scale}")

    from ..tools.demo import run_demo

    run_demo(given.out, given.minutes_scale)
    return 0
