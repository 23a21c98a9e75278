"""What a build must keep to: no spills, memory and registers within limits, wide accesses, declared products.

An access is narrow when its instructions give a thread fewer bytes than it could take at once: 16, or the
block's bytes per thread when they are fewer, or what the tensor's layout allows (elements side by side along
the last dimension, rows of such a multiple). Single values, the same for all threads, are never narrow.
Narrow accesses must be declared with their reason in aot_budgets.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.aot_read import Resources

Use = Literal["preset", "variant", "candidate"]
"""who starts a build: a benchmark's case, one of aot_variants.py, or only a configuration not in use here"""

DOES_NOT_COMPILE = "does not compile"
"""how that problem begins"""

WIDEST = 16
"""bytes: what one instruction gives a thread at most (256-bit accesses of sm_100 need 32-byte alignment)"""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one, and of a program on it."""

    shared_program: int
    shared_total: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32


LIMITS = {
    "sm_80": Multiprocessor(shared_program=163 << 10, shared_total=164 << 10),
    "sm_90": Multiprocessor(shared_program=227 << 10, shared_total=228 << 10),
    "sm_100": Multiprocessor(shared_program=227 << 10, shared_total=228 << 10),
}
LDS = 64 << 10
"""bytes of shared memory of a program on gfx942"""
RESERVED = 1024
"""bytes of shared memory the system takes for each program"""


@dataclass(frozen=True)
class Narrow:
    """Leave for an argument's narrow accesses."""

    why: str
    widest: int = 0
    """bits that its widest instruction must still have, where only some accesses are narrow"""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one kernel may use, whatever its shapes."""

    registers: int
    """per thread at the presets' shapes, on every NVIDIA target"""
    further: int = 0
    """registers in the calls of aot_variants.py, where those may take more"""
    narrow: Mapping[str, Narrow] = field(default_factory=dict)
    """argument -> why its accesses cannot be wider"""
    spilled_on_amd: int = 0
    """bytes per thread it may spill on gfx942, where tiles are NVIDIA's"""
    products: str | Callable[[Mapping[str, Any]], str] = ""
    """matrix instruction it must have on sm_90 in 16 bits: HGMMA or HMMA; none when empty, and in fp32. Or a
    function of a build's arguments (`aot_build.Build.arguments`), where that depends on tiles"""


def problems(
    found: Resources | str,
    target: str,
    budget: Budget | None,
    vectors: Mapping[str, int],
    use: Use = "preset",
    pointers: str = "bf16",
    arguments: Mapping[str, Any] | None = None,
) -> list[str]:
    """Everything that is wrong with a build.

    vectors: argument -> bytes that its layout allows at once (`aot_record.vector_bytes`).
    pointers: the build's floating types. arguments: the build's (`aot_build.Build.arguments`).
    """
    if isinstance(found, str):
        return [f"{DOES_NOT_COMPILE}: {found}"]
    if budget is None:
        return ["no entry in benchmarks/aot_budgets.py"]
    wrong = []
    if found.spilled > (0 if target in LIMITS else budget.spilled_on_amd):
        wrong.append(f"spills {found.spilled} bytes per thread")
    if target not in LIMITS:
        if found.shared > LDS:
            wrong.append(f"shared memory {found.shared} above {LDS} bytes")
        return wrong
    if found.unfenced:
        wrong.append(f"{found.unfenced} pipelined loops without fence.proxy.async between copy and product")
    if found.shared > LIMITS[target].shared_program:
        wrong.append(f"shared memory {found.shared} above {LIMITS[target].shared_program} bytes")
    registers = {"preset": budget.registers, "variant": max(budget.registers, budget.further)}.get(use, 255)
    if found.registers > registers:
        wrong.append(f"{found.registers} registers, budget {registers}")
    if target == "sm_90":
        names = " and ".join(sorted(found.products)) or "none"
        products = budget.products
        if callable(products):
            products = products(arguments or {})
        expected = (products if "16" in pointers else "") or "none"
        if names != expected:
            wrong.append(f"matrix instructions: {names}, expected {expected}")
    for access, narrowest, possible in narrow_accesses(found, vectors):
        leave = budget.narrow.get(access.split(" ", 1)[1])
        widest = max(bits for bits, *_ in found.traffic[access].blocks)
        if leave is None:
            wrong.append(f"{access}: {8 * narrowest}-bit accesses where {8 * possible}-bit ones are possible")
        elif widest < leave.widest:
            wrong.append(f"{access}: at most {widest}-bit accesses, declared {leave.widest}-bit")
    return wrong


def narrow_accesses(found: Resources, vectors: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """(access, bytes of its narrowest instruction, bytes it could have) of every narrow one."""
    narrow = []
    for access, traffic in found.traffic.items():
        names = access.split(" ", 1)[1].split("|")
        layout = max(vectors.get(name, WIDEST) for name in names)
        worst: tuple[int, int] | None = None
        for bits, lane, _ in traffic.blocks:
            possible = max(traffic.item, min(WIDEST, layout, _power_of_two(lane)))
            if bits // 8 < possible and (worst is None or bits // 8 < worst[0]):
                worst = (bits // 8, possible)
        if worst is not None:
            narrow.append((access, *worst))
    return narrow


def programs_per_multiprocessor(found: Resources, target: str) -> int:
    """How many programs of the kernel one multiprocessor holds at a time; 0 when none fits."""
    limit = LIMITS[target]
    # Registers are dealt to warps in units of 256, shared memory in units of 128 bytes.
    per_warp = -(-found.registers * 32 // 256) * 256
    shared = -(-(found.shared + RESERVED) // 128) * 128
    by_registers = limit.registers // max(1, per_warp) // found.warps
    return min(by_registers, limit.shared_total // shared, limit.warps // found.warps, limit.programs)


def _power_of_two(value: float) -> int:
    """The largest power of two up to `value`, 1 at least."""
    return 1 << max(0, int(value).bit_length() - 1)
