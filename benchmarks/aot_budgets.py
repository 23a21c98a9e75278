"""What each kernel may use: registers, narrow accesses and why, matrix instructions; and what it moves.

A kernel without an entry fails `python -m benchmarks.aot`, so a new one declares what it needs. Registers are
the most that any preset's shape takes on any NVIDIA target, plus a few; an entry that must grow says why in
its commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.aot_gate import Budget, Narrow

_MASK = Narrow("a byte per token: of a row that starts anywhere, and one to a hundred of the row's bytes")
_SLOTS = Narrow("an int32 per token: of a row that starts anywhere, and a hundredth of the row's bytes")
_ODD_ENDS = Narrow("fours of elements are one access; what is left over at a tensor's end goes singly", 128)
_PARTIALS = Narrow("partial sums, a few KB out of L2")


def _attention_products(given: Mapping[str, Any]) -> str:
    """wgmma wherever 64 tokens and more make a tile; fp32 products are exact, so none."""
    if given["qkv_ptr"] == "*fp32":
        return ""
    return "HGMMA" if given.get("BLOCK_S", 64) >= 64 else "HMMA"


BUDGETS: dict[str, Budget] = {
    "adamw_ema_fwd_kernel": Budget(registers=56, further=72, narrow={"*table_ptr": _ODD_ENDS}),
    "attention_bwd_kernel_keys": Budget(registers=255, products=_attention_products),
    "attention_bwd_kernel_queries": Budget(registers=255, products=_attention_products),
    "attention_bwd_kernel_short": Budget(registers=255, products=_attention_products),
    "attention_fwd_kernel": Budget(registers=255, products=_attention_products),
    "attention_fwd_kernel_short": Budget(registers=255, products=_attention_products),
    "column_sums_kernel": Budget(registers=64),
    "ema_fwd_kernel": Budget(registers=40, narrow={"*table_ptr": _ODD_ENDS}),
    "gather_bwd_kernel_rows": Budget(registers=136),
    "gather_fwd_kernel": Budget(registers=48),
    "loss_bwd_kernel": Budget(registers=64),
    "loss_fwd_kernel": Budget(registers=136, further=160, narrow={"slot_ptr": _SLOTS}),
    "loss_fwd_kernel_finish": Budget(
        registers=64, narrow={"penalty_ptr": _PARTIALS, "spread_ptr": _PARTIALS}
    ),
    "masks_fwd_kernel": Budget(
        registers=120,
        further=136,
        narrow={
            "mask_ptr": _MASK,
            "ids_keep_ptr": Narrow("each kept token finds its own place: a scatter within the row"),
        },
    ),
    "mlp_bwd_kernel_hidden": Budget(registers=80),
    "mlp_fwd_kernel": Budget(registers=40),
    # Dropout, drop path and three column sums at once hold 1.5 times as much; no preset asks for that.
    "residual_norm_bwd_kernel_rows": Budget(registers=176, further=255),
    "residual_norm_fwd_kernel": Budget(registers=80),
    "scatter_fwd_kernel": Budget(registers=72),
    "targets_fwd_kernel_batch": Budget(registers=128),
    "targets_fwd_kernel_batch_moments": Budget(registers=96),
    "targets_fwd_kernel_rows": Budget(registers=80),
    "targets_fwd_kernel_tokens": Budget(registers=48),
}

# A launch's arguments by name; "programs" is their number, "shapes" the preset's, "table" the pointer table.
Given = Mapping[str, Any]

_CODE_BYTES = (0, 4, 2, 2)
"""of a tensor in a pointer table, by its code (kernels/_chunks.py): none, fp32, fp16, bf16"""


def _columns(*columns: int) -> Callable[[Given], float]:
    """All tensors in these columns of a pointer table."""

    def moved(given: Given) -> float:
        kinds = given["KINDS"]
        records = given["table"][given["programs"] :].view(-1, 3 + len(kinds[0]))
        items = [sum(_CODE_BYTES[kind[column]] for column in columns) for kind in kinds]
        return sum(elements * items[kind] for elements, kind in records[:, :2].tolist())

    return moved


def _all_of(name: str) -> Callable[[Given], float]:
    return lambda given: given[name].numel() * given[name].element_size()


def _kept_of(name: str) -> Callable[[Given], float]:
    """Kept rows of a tensor [B, T, D] or [N, T, D]; each row of [B, T, D] is kept in some version."""
    return lambda given: min(
        _all_of(name)(given), given["ids_ptr"].numel() * given["WIDTH"] * given[name].element_size()
    )


def _masked_of(name: str, everywhere: Callable[[Given], bool]) -> Callable[[Given], float]:
    """Masked rows of a tensor [N, T, D] where `everywhere`, else all of [N, T - K, D]."""

    def moved(given: Given) -> float:
        shapes = given["shapes"]
        return _all_of(name)(given) * (shapes.masked / shapes.tokens if everywhere(given) else 1)

    return moved


def _slots_of(name: str, share: int) -> Callable[[Given], float]:
    """`share` of the three tensors q, k, v in [N, S, 3, H, Dh]."""
    return lambda given: _all_of(name)(given) * share / 3


# kernel -> "load x_ptr" or "store x_ptr" -> bytes, where it is not the whole tensor once.
TOUCHED: dict[str, dict[str, Callable[[Given], float]]] = {
    "adamw_ema_fwd_kernel": {
        "load *table_ptr": _columns(0, 1, 2, 3, 4),
        "store *table_ptr": _columns(0, 2, 3, 4, 5, 6),
    },
    "attention_bwd_kernel_keys": {"store dqkv_ptr": _slots_of("dqkv_ptr", 2)},
    "attention_bwd_kernel_queries": {"store dqkv_ptr": _slots_of("dqkv_ptr", 1)},
    "ema_fwd_kernel": {"load *table_ptr": _columns(0, 1), "store *table_ptr": _columns(0, 2)},
    "gather_fwd_kernel": {"load x_ptr": _kept_of("x_ptr"), "load per_mask_ptr": _kept_of("per_mask_ptr")},
    "loss_bwd_kernel": {
        "load grad_ptr": _masked_of("grad_ptr", lambda given: given["slot_ptr"] is not None),
        "store dpred_ptr": _masked_of(
            "dpred_ptr", lambda given: given["slot_ptr"] is not None and given["IN_PLACE"]
        ),
    },
    "loss_fwd_kernel": {"load pred_ptr": _masked_of("pred_ptr", lambda given: given["EVERY_TOKEN"])},
}
