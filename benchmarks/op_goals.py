"""What ops are to reach on an H200 in bf16, and what they reached there: a table of README's results.

A goal is for one direction of one case: microseconds or floors at most, or a share of the measured
ceiling (copy rate or matmul rate, whichever bounds it) at least. Backward is forward and backward together
less forward, of the same variant. What counts is our fastest variant that is not eager.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.report import NOT_MEASURED, Results, markdown, percent, short

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """kind: what `limit` is: microseconds or floors, both at most, or a share of the ceiling, at least."""

    op: str
    case: str
    preset: str
    direction: Literal["forward", "backward"]
    kind: Literal["us", "floors", "share"]
    limit: float

    @property
    def words(self) -> str:
        if self.kind == "share":
            return f"at least {percent(self.limit)} of the ceiling"
        return f"at most {short(self.limit)} {'us' if self.kind == 'us' else 'floors'}"


GOALS = (
    Goal("gather_tokens", "student input", "image_base", "forward", "us", 10),
    Goal("multimask_attention", "student", "image_base", "forward", "floors", 2),
    Goal("multimask_attention", "student", "image_base", "backward", "floors", 2.5),
    Goal("multimask_attention", "student", "audio_base", "forward", "us", 45),
    Goal("multimask_attention", "student", "audio_base", "backward", "us", 140),
    Goal("conv_block_2d", "decoder", "image_base", "forward", "us", 165),
    Goal("conv_block_2d", "decoder", "image_base", "backward", "us", 360),
    Goal("conv_block_1d", "decoder", "audio_base", "forward", "us", 20),
    Goal("conv_block_1d", "decoder", "audio_base", "backward", "us", 55),
    Goal("conv_block_1d", "decoder", "text_base", "forward", "share", 0.74),
    Goal("conv_block_1d", "decoder", "text_base", "backward", "share", 0.74),
    Goal("conv_block_1d", "positions", "audio_base", "forward", "us", 430),
    Goal("layer_targets", "top 8", "audio_base", "forward", "us", 16),
    Goal("layer_targets", "top 10", "image_base", "forward", "us", 20),
    Goal("masked_regression_loss", "masked places", "audio_base", "forward", "us", 15),
    Goal("masked_regression_loss", "masked places", "image_base", "forward", "us", 40),
    Goal("ema_update_", "fp32", "image_base", "forward", "share", 0.9),
    Goal("AdamWEMA", "fp32 and bfloat16 copies", "image_base", "forward", "share", 0.85),
)
DTYPES = ("bfloat16", "float32")
"""of the rows: masters are fp32"""


def op_goals_table(files: Sequence[Results]) -> list[str]:
    """A line for every goal, measured or not."""
    rows = [
        row
        for one in files
        if "H200" in str(one.facts.get("gpu"))
        for row in one.data["rows"]
        if row["status"] == "ok" and row["dtype"] in DTYPES
    ]
    cells = []
    for goal in GOALS:
        reached, verdict = _reached(goal, rows)
        cells.append([f"{goal.op}, {goal.case}", goal.preset, goal.direction, goal.words, reached, verdict])
    head = ["op on an H200, bf16", "preset", "direction", "goal", "reached", ""]
    return markdown(head, cells, 6)


def _reached(goal: Goal, rows: Iterable[Row]) -> tuple[str, str]:
    """(time, and share or floors where the goal is one; "met" or "not met")."""
    best: tuple[float, float, str] | None = None  # microseconds, floor in microseconds, variant
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row["op"], row["case"], row["preset"]) == (goal.op, goal.case, goal.preset) and row["ours"]:
            found.setdefault(row["variant"], {})[row["direction"]] = row
    for variant, directions in found.items():
        if variant == "eager" or "forward" not in directions:
            continue
        us, floor = directions["forward"]["us"], directions["forward"]["floor_us"]
        if goal.direction == "backward":
            if "forward+backward" not in directions:
                continue
            both = directions["forward+backward"]
            us, floor = both["us"] - us, both["floor_us"] - floor
        if best is None or us < best[0]:
            best = us, floor, variant
    if best is None:
        return NOT_MEASURED, ""
    us, floor, variant = best
    value = {"us": us, "floors": us / floor, "share": floor / us}[goal.kind]
    detail = {"us": "", "floors": f", {value:.1f} floors", "share": f", {percent(value)}"}[goal.kind]
    met = value >= goal.limit if goal.kind == "share" else value <= goal.limit
    return f"{short(us)} us{detail} ({variant})", "met" if met else "not met"
