"""What each CUDA kernel of csrc/ may use, and how wide its accesses are.

Registers are the most that any architecture takes, plus a few. 128-bit accesses are counted in instructions,
the fewest of any architecture; so are narrow ones, the most. An entry that changes says why in its commit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CudaBudget:
    """Limits on every architecture."""

    registers: int
    wide_loads: int = 0
    """128-bit instructions its loops must have"""
    wide_stores: int = 0
    narrow_loads: int = 1000
    """narrower instructions it may have at most, wherever they stand"""
    narrow_stores: int = 1000
    why: str = ""
    """what is narrow, where `narrow_loads` and `narrow_stores` allow any"""


def _for_dtypes(name: str, wide: CudaBudget, narrow: CudaBudget) -> dict[str, CudaBudget]:
    """One kernel for whole 16-byte accesses and one for what is not aligned, of each dtype."""
    vectors = {"float": 4, "Fp16": 8, "Bf16": 8}
    entries = {f"{name}<{element}, {vector}>": wide for element, vector in vectors.items()}
    return entries | {f"{name}<{element}, 1>": narrow for element in vectors}


_SINGLE = "made for rows that 16-byte accesses do not fit: everything goes element by element"
_TABLES = (
    "two dependent loads of 8 bytes find the chunk; a 16-bit tensor's four elements are 8 bytes; the last "
    "elements of a tensor, and all of one that is not aligned, go one by one"
)

BUDGETS: dict[str, CudaBudget] = {
    "adamw_ema_fwd_kernel": CudaBudget(
        # p, m, v and the teacher in each of the three loops by the gradient's dtype, and fp32 gradients
        registers=88, wide_loads=13, wide_stores=18, narrow_loads=48, narrow_stores=32, why=_TABLES,
    ),
    "ema_fwd_kernel": CudaBudget(
        # two teachers in each of the three loops by the student's dtype, and two fp32 students
        registers=56, wide_loads=8, wide_stores=12, narrow_loads=32, narrow_stores=24, why=_TABLES,
    ),
    "masks_fwd_kernel": CudaBudget(
        registers=72, wide_stores=2, narrow_loads=88, narrow_stores=180,
        why="marks are bytes and kept tokens a scatter; rows beyond shared memory wait in the outputs",
    ),
    **_for_dtypes(
        "gather_fwd_kernel",
        CudaBudget(registers=88, wide_loads=16, wide_stores=8, narrow_loads=1, narrow_stores=0, why="ids"),
        CudaBudget(registers=64, why=_SINGLE),
    ),
    **_for_dtypes(
        "gather_bwd_kernel_rows",
        CudaBudget(registers=96, wide_loads=4, wide_stores=5, narrow_loads=4, narrow_stores=0, why="slots"),
        CudaBudget(registers=64, why=_SINGLE),
    ),
    **_for_dtypes(
        "scatter_fwd_kernel",
        CudaBudget(
            registers=56, wide_loads=4, wide_stores=5, narrow_loads=2, narrow_stores=0, why="slot and seed"
        ),
        CudaBudget(registers=48, why=_SINGLE),
    ),
    **_for_dtypes(
        "mask_token_bwd_kernel",
        CudaBudget(registers=56, wide_loads=4, narrow_loads=4, narrow_stores=0, why="slots"),
        CudaBudget(registers=48, why=_SINGLE),
    ),
    **{
        f"gather_bwd_kernel_sums<{element}, 4>": CudaBudget(
            registers=40, wide_loads=8, narrow_loads=0, narrow_stores=4, why="four 16-bit sums are 8 bytes"
        )
        for element in ("float", "Fp16", "Bf16")
    },
    **{
        f"gather_bwd_kernel_sums<{element}, 1>": CudaBudget(registers=40, why=_SINGLE)
        for element in ("float", "Fp16", "Bf16")
    },
}  # fmt: skip
