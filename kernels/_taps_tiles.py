"""A product over taps by tiles: one program makes BLOCK_M blocks of places by one tile of a group's columns.

Forward, and the gradient of x (see conv_block.py and _taps.py). Programs that share rows follow each other,
so that rows come out of L2 after the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.kernels._launch import launch
from d2vkern.kernels._taps import (
    Places,
    Taps,
    first_places,
    grouped,
    output_columns,
    packed_weights,
    product_configs,
    tap_bits,
    taps_product,
)
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket


@triton.jit
def store_product(
    out_ptr,  # the group's first channel
    bias_ptr,  # likewise, or None
    value,  # [BLOCK_M, BLOCK] fp32
    row,
    w,
    live,
    width,
    first,
    OUTS: tl.constexpr,
    OUT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns of the product from `first` on, plus bias, to the rows of their outputs."""
    shift, channel, exists = output_columns(first, OUT, SPAN, BLOCK)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    inside = live[:, None] & exists[None, :]
    if SPAN > 1:
        inside &= w[:, None] + shift[None, :] < width
    at = row.to(tl.int64)[:, None] * OUTS + (shift * OUTS + channel)[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "height", "width", "picked", "clones"])
def taps_tiles_kernel(
    source_ptr,  # [.., height, width, GROUPS * IN]
    weight_ptr,  # [GROUPS, K, COLUMNS] packed
    bias_ptr,  # [GROUPS * OUT] or None
    index_ptr,  # [N, picked]: outputs of a line, or None: all
    bits_ptr,  # [N, width] int32, or None: forward of a masked input
    mask_ptr,  # [N, width] uint8, or None: gradient of a masked input, summed over its clones
    add_ptr,  # [.., GROUPS * OUT] or None: what the product is added to
    slot_ptr,  # [N * width] int32 or None: where in `add` a row is, -1: nowhere
    out_ptr,  # [outputs, GROUPS * OUT]
    blocks,
    height,
    width,
    picked,
    clones,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C: tl.constexpr = GROUPS * IN
    OUTS: tl.constexpr = GROUPS * OUT
    WINDOW: tl.constexpr = KW + SPAN - 1
    TILE: tl.constexpr = BLOCK_N + BLOCK_N2
    TILES: tl.constexpr = (SPAN * OUT + TILE - 1) // TILE
    # Neighbouring programs share rows.
    program = tl.program_id(0)
    tile, group = program % TILES * TILE, program // TILES % GROUPS
    # [BLOCK_M]
    block = program // (TILES * GROUPS) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = block < blocks
    row, h, w = first_places(block, blocks, index_ptr, height, width, picked, SPAN)
    bits = row
    group_source_ptr = source_ptr + group * IN
    group_weight_ptr = weight_ptr + group.to(tl.int64) * (KH * WINDOW * IN * TILES * TILE) + tile
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    rest = tl.zeros([BLOCK_M, BLOCK_N2 if BLOCK_N2 > 0 else 16], tl.float32)
    if mask_ptr is None:
        source = row
        if bits_ptr is not None:
            bits = tl.load(bits_ptr + row, mask=live, other=0)
            source = row // width // clones * width + w
        acc, rest = taps_product(
            acc, rest, group_source_ptr + source.to(tl.int64) * C, group_weight_ptr,
            h, w, live, bits, height, width,
            C, IN, KH, WINDOW, PAD_H, PAD_W, TILES * TILE, BLOCK_N, BLOCK_N2, BLOCK_K, bits_ptr is not None,
        )  # fmt: skip
    else:
        for clone in range(clones):
            version = (row // width * clones + clone) * width + w
            kept = live & (tl.load(mask_ptr + version, mask=live, other=1) == 0)
            acc, rest = taps_product(
                acc, rest, group_source_ptr + version.to(tl.int64) * C, group_weight_ptr,
                h, w, kept, bits, height, width,
                C, IN, KH, WINDOW, PAD_H, PAD_W, TILES * TILE, BLOCK_N, BLOCK_N2, BLOCK_K, False,
            )  # fmt: skip
    out_row = row if index_ptr is None else block
    group_bias_ptr = None if bias_ptr is None else bias_ptr + group * OUT
    group_add_ptr = None if add_ptr is None else add_ptr + group * OUT
    add_row, add_live = row, live
    if slot_ptr is not None:
        add_row = tl.load(slot_ptr + row, mask=live, other=-1)
        add_live = add_row >= 0
    acc = _added(group_add_ptr, acc, add_row, w, add_live, width, tile, OUTS, OUT, SPAN, BLOCK_N)
    group_out_ptr = out_ptr + group * OUT
    store_product(group_out_ptr, group_bias_ptr, acc, out_row, w, live, width, tile, OUTS, OUT, SPAN, BLOCK_N)
    if BLOCK_N2 > 0:
        tile += BLOCK_N
        rest = _added(group_add_ptr, rest, add_row, w, add_live, width, tile, OUTS, OUT, SPAN, BLOCK_N2)
        store_product(
            group_out_ptr, group_bias_ptr, rest, out_row, w, live, width, tile, OUTS, OUT, SPAN, BLOCK_N2
        )


@triton.jit
def _added(add_ptr, value, row, w, live, width, first, OUTS: tl.constexpr, OUT: tl.constexpr,
           SPAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The product's columns from `first` on, plus what stands at their places in `add`."""
    if add_ptr is None:
        return value
    else:
        shift, channel, exists = output_columns(first, OUT, SPAN, BLOCK)
        inside = live[:, None] & exists[None, :]
        if SPAN > 1:
            inside &= w[:, None] + shift[None, :] < width
        at = row.to(tl.int64)[:, None] * OUTS + (shift * OUTS + channel)[None, :]
        return value + tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)


def product_config(kernel: str, taps: Taps, places: Places, itemsize: int, **settings: bool) -> Config:
    """The tiles of one of the two product kernels."""
    form = "all" if places.index is None else "picked"
    bucket = f"{power_of_two_bucket(rows=places.outputs)} {form} bytes{itemsize} " + " ".join(
        f"{name}{value}" for name, value in taps.constexprs.items() if not name.startswith("PAD")
    )
    form = "".join(f" {name}{int(value)}" for name, value in sorted(settings.items()))
    return choose(kernel, bucket + form, product_configs(taps, places, itemsize, **settings))


def launch_tiles(
    source: Tensor,
    weight: Tensor,
    taps: Taps,
    places: Places,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    masked: Tensor | None = None,
    summed: Tensor | None = None,
    clones: int = 1,
    add: Tensor | None = None,
    slot: Tensor | None = None,
) -> None:
    """One product for all outputs. masked: of the source's versions; summed: of the versions to sum over."""
    # What differs from one output of a block to the next is looked up once per block.
    spread = summed is None and slot is None
    settings = {"owner": False, "spread": spread, "added": add is not None}
    config = product_config("taps_tiles_kernel", taps, places, source.element_size(), **settings)
    tiles = triton.cdiv(config["SPAN"] * taps.outer, config["BLOCK_N"] + config["BLOCK_N2"])
    launch(
        taps_tiles_kernel,
        (triton.cdiv(places.blocks(config["SPAN"]), config["BLOCK_M"]) * tiles * taps.groups,),
        grouped(source, taps.groups),
        packed_weights(weight, taps, config, source.dtype),
        bias,
        places.index,
        tap_bits(masked, taps, config["SPAN"]),
        None if summed is None else summed.contiguous().view(torch.uint8),
        None if add is None else grouped(add, taps.groups),
        slot,
        grouped(out, taps.groups),
        places.blocks(config["SPAN"]),
        places.height,
        places.width,
        places.picked,
        clones,
        **taps.constexprs,
        **config,
    )
