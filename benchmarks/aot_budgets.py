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
_TAPS = Narrow("taps of a weight lie side by side, its channels do not; a program moves all taps of its own")
_PARTIALS = Narrow("partial sums, a few KB out of L2")
_WINDOWS = Narrow("windows of ten samples, one at every fifth: 20 bytes for the 1,024 of an output row")
_REPACKED = Narrow("as large as the weights, whose order it changes: taps innermost")


def _attention_products(given: Mapping[str, Any]) -> str:
    """wgmma wherever 64 tokens and more make a tile; fp32 products are exact, so none."""
    if given["qkv_ptr"] == "*fp32":
        return ""
    return "HGMMA" if given.get("BLOCK_S", 64) >= 64 else "HMMA"


BUDGETS: dict[str, Budget] = {
    "adamw_ema_fwd_kernel": Budget(registers=56, further=72, narrow={"*table_ptr": _ODD_ENDS}),
    # On gfx942 the second stage waits in registers.
    "attention_bwd_kernel_keys": Budget(registers=255, spilled_on_amd=4, products=_attention_products),
    "attention_bwd_kernel_queries": Budget(registers=255, products=_attention_products),
    "attention_bwd_kernel_short": Budget(registers=255, products=_attention_products),
    "attention_fwd_kernel": Budget(registers=240, products=_attention_products),
    "attention_fwd_kernel_short": Budget(registers=152, further=192, products=_attention_products),
    "column_sums_kernel": Budget(registers=64),
    "conv_block_bwd_kernel_rows": Budget(registers=200),
    "conv_block_fwd_kernel_norm": Budget(registers=128),
    "conv_block_fwd_kernel_rows": Budget(registers=255, products="HGMMA"),
    # Tiles of 128 x 256 in eight warps hold 128 sums a thread.
    "conv_stem_bwd_kernel_input": Budget(registers=255, products="HGMMA"),
    "conv_stem_bwd_kernel_norm": Budget(registers=136),
    "conv_stem_bwd_kernel_sum": Budget(registers=40, narrow={"dweight_ptr": _REPACKED}),
    "conv_stem_bwd_kernel_wave": Budget(
        registers=224, narrow={"x_ptr": _WINDOWS, "partials_ptr": _PARTIALS}, products="HGMMA and HMMA"
    ),
    "conv_stem_bwd_kernel_wave_finish": Budget(registers=40, narrow={"dweight_ptr": _REPACKED}),
    "conv_stem_bwd_kernel_wave_squares": Budget(
        registers=72, narrow={"x_ptr": _WINDOWS, "partials_ptr": _PARTIALS}
    ),
    "conv_stem_bwd_kernel_weight": Budget(registers=232, products="HGMMA"),
    "conv_stem_fwd_kernel": Budget(registers=255, products="HGMMA"),
    "conv_stem_fwd_kernel_wave": Budget(registers=136, narrow={"x_ptr": _WINDOWS}, products="HGMMA"),
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
    "mask_token_bwd_kernel": Budget(registers=72, narrow={"slot_ptr": _SLOTS}),
    "mlp_bwd_kernel_hidden": Budget(registers=80),
    "mlp_fwd_kernel": Budget(registers=40),
    # Dropout, drop path and three column sums at once hold 1.5 times as much; no preset asks for that.
    "residual_norm_bwd_kernel_rows": Budget(registers=184, further=255),
    "residual_norm_fwd_kernel": Budget(registers=80),
    "scatter_fwd_kernel": Budget(registers=72),
    "taps_bits_kernel": Budget(registers=64, narrow={"mask_ptr": _MASK}),
    "taps_tiles_kernel": Budget(registers=255, products="HGMMA"),
    "taps_weight_kernel": Budget(registers=255, products="HGMMA"),
    "taps_weight_kernel_sum": Budget(registers=128, narrow={"dw_ptr": _TAPS}),
    "taps_weights_kernel": Budget(registers=128, narrow={"weight_ptr": _TAPS}),
    "targets_fwd_kernel_batch": Budget(registers=128),
    "targets_fwd_kernel_batch_moments": Budget(registers=96),
    "targets_fwd_kernel_rows": Budget(registers=80),
    "targets_fwd_kernel_tokens": Budget(registers=48),
}

# A launch's arguments by name; "programs" is their number, "shapes" the preset's, "table" the pointer table.
Given = Mapping[str, Any]

_CODE_BYTES = (0, 4, 2, 2)
"""of a tensor in a pointer table, by its code (kernels/_table.py): none, fp32, fp16, bf16"""


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


def _nothing(given: Given) -> float:
    return 0.0


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
    # A program reads again what it has just written: 128 KB, out of L2.
    "conv_stem_fwd_kernel": {"load r_ptr": _nothing},
    # its own rows, just written: out of L1 or L2
    "conv_block_fwd_kernel_rows": {"load r_ptr": _nothing},
    "ema_fwd_kernel": {"load *table_ptr": _columns(0, 1), "store *table_ptr": _columns(0, 2)},
    "gather_fwd_kernel": {"load x_ptr": _kept_of("x_ptr"), "load per_mask_ptr": _kept_of("per_mask_ptr")},
    "loss_bwd_kernel": {
        "load grad_ptr": _masked_of("grad_ptr", lambda given: given["slot_ptr"] is not None),
        "store dpred_ptr": _masked_of(
            "dpred_ptr", lambda given: given["slot_ptr"] is not None and given["IN_PLACE"]
        ),
    },
    "loss_fwd_kernel": {"load pred_ptr": _masked_of("pred_ptr", lambda given: given["EVERY_TOKEN"])},
    "mask_token_bwd_kernel": {"load dout_ptr": _masked_of("dout_ptr", lambda _: True)},
}

# kernel -> tensors that its op's plan moves once in this launch. Each share of a weight gradient is written
# and read. conv_block's packed weights are overhead; conv_stem's are part of its plan, as its last layers
# have few rows: weights are read, repacked and read once more.
PASSES: dict[str, tuple[str, ...]] = {
    "conv_block_bwd_kernel_rows": ("dy_ptr", "r_ptr", "dr_ptr"),
    "conv_block_fwd_kernel_norm": ("r_ptr", "skip_ptr", "y_ptr"),
    "conv_block_fwd_kernel_rows": ("x_ptr", "r_ptr", "y_ptr"),
    "conv_stem_bwd_kernel_input": ("dr_ptr", "weight_ptr", "dx_ptr"),
    "conv_stem_bwd_kernel_norm": ("dy_ptr", "r_ptr", "dr_ptr"),
    "conv_stem_bwd_kernel_sum": ("partials_ptr", "dweight_ptr"),
    "conv_stem_bwd_kernel_wave": ("dy_ptr", "along_ptr"),
    "conv_stem_bwd_kernel_wave_squares": ("along_ptr",),
    "conv_stem_bwd_kernel_weight": ("x_ptr", "dr_ptr", "partials_ptr"),
    "conv_stem_fwd_kernel": ("x_ptr", "r_ptr", "y_ptr", *("weight_ptr",) * 3),
    "conv_stem_fwd_kernel_wave": ("x_ptr", "y_ptr"),
    "taps_tiles_kernel": ("source_ptr", "add_ptr", "out_ptr"),
    "taps_weight_kernel": ("x_ptr", "dr_ptr", "partials_ptr"),
    "taps_weight_kernel_sum": ("partials_ptr", "dw_ptr"),
    "taps_weights_kernel": ("weight_ptr",),
}


def _taps_flops(given: Given, outputs: int) -> tuple[float, float]:
    """Of a product over taps: useful for `outputs` places, and issued with all padding."""
    taps, channels, span = given["KH"] * given["KW"], given["GROUPS"] * given["OUT"], given["SPAN"]
    depth = given["KH"] * (given["KW"] + span - 1) * given["IN"]
    steps = -(-depth // given["BLOCK_K"])
    tile = given["BLOCK_M"] * (given["BLOCK_N"] + given["BLOCK_N2"]) * given["BLOCK_K"]
    return 2.0 * outputs * channels * taps * given["IN"], 2.0 * given["programs"] * steps * tile


def _tiles_flops(given: Given) -> tuple[float, float]:
    versions = given["clones"] if given["mask_ptr"] is not None else 1
    channels = given["GROUPS"] * given["OUT"]
    useful, issued = _taps_flops(given, given["out_ptr"].numel() // channels)
    return useful * versions, issued * versions


def _rows_flops(given: Given) -> tuple[float, float]:
    useful, issued = _taps_flops(given, given["y_ptr"].numel() // (given["GROUPS"] * given["OUT"]))
    return useful, issued * given["GROUPS"]


def _weight_flops(given: Given) -> tuple[float, float]:
    """A share ends in a block that may be part empty."""
    depth, rows = given["KH"] * given["KW"] * given["IN"], given["rows"]
    shares = given["partials_ptr"].shape[0]
    tiles = given["programs"] // shares
    steps = shares * -(-rows // shares // given["BLOCK_R"])
    tile = given["BLOCK_M"] * given["BLOCK_N"] * given["BLOCK_R"]
    return 2.0 * rows * given["GROUPS"] * depth * given["OUT"], 2.0 * tiles * steps * tile


# kernel -> (useful, issued) FLOPs of one launch's matrix products.
ISSUED: dict[str, Callable[[Given], tuple[float, float]]] = {
    "conv_block_fwd_kernel_rows": _rows_flops,
    "taps_tiles_kernel": _tiles_flops,
    "taps_weight_kernel": _weight_flops,
}
