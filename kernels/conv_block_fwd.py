"""Forward of conv_block: see conv_block.py."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range
from d2vkern.kernels._common import gelu
from d2vkern.kernels._launch import launch
from d2vkern.kernels._rows import chunk_width, dense, deviations, mean_of, row_config, tile_columns
from d2vkern.kernels._taps import Places, Taps, first_places, grouped, packed_weights, tap_bits, taps_product
from d2vkern.kernels._taps_tiles import launch_tiles, product_config, store_product
from d2vkern.kernels._tuning import choose, power_of_two_bucket

OWNER = "conv_block_forward"
"""the choice between the two ways to run the forward of few outputs per group"""
MOST_OWNED = 128
"""outputs per group up to which one program makes whole rows"""


@triton.jit
def norm_gelu_rows(
    r_ptr,  # [rows, D]
    skip_ptr,  # [.., D] or None
    y_ptr,  # [rows, D], may be r
    row,
    skip_row,
    live,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = gelu((r - mean) rstd) (+ skip) of BLOCK_R rows, each in registers as a whole."""
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    row64 = row.to(tl.int64)[:, None] * D
    values = ()
    total = tl.zeros([BLOCK_R, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        # [1, CHUNK] and [BLOCK_R, CHUNK]
        column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
        values = values + (tl.load(r_ptr + row64 + column, mask=inside, other=0.0).to(tl.float32),)
        total += values[chunk]
    # [BLOCK_R, CHUNK] and [BLOCK_R]
    centred, variance = deviations(values, mean_of(total, D), D, CHUNK)
    # Rows that are not there have variance 0, of which there is no root.
    rstd = tl.rsqrt(tl.where(live, variance, 1.0)[:, None] + eps)
    for chunk in tl.static_range(CHUNKS):
        column, inside = tile_columns(chunk * CHUNK, live, D, CHUNK)
        y = gelu(centred[chunk] * rstd)
        if skip_ptr is not None:
            at = skip_row.to(tl.int64)[:, None] * D + column
            y += tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row64 + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "height", "width", "picked", "clones"])
def conv_block_fwd_kernel_rows(
    x_ptr,  # [N or N / clones, height, width, GROUPS * IN]
    weight_ptr,  # [GROUPS, K, COLUMNS] packed
    bias_ptr,  # [GROUPS * OUT] or None
    index_ptr,  # [N, picked]: outputs of a line, or None: all
    bits_ptr,  # [N, width] int32, or None
    r_ptr,  # [outputs, GROUPS * OUT]: the convolution, may be y
    y_ptr,  # [outputs, GROUPS * OUT]
    blocks,
    height,
    width,
    picked,
    clones,
    eps,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    C: tl.constexpr = GROUPS * IN
    OUTS: tl.constexpr = GROUPS * OUT
    WINDOW: tl.constexpr = KW + SPAN - 1
    COLUMNS: tl.constexpr = BLOCK_N + BLOCK_N2
    first_block = tl.program_id(0) * BLOCK_M
    # [BLOCK_M]
    block = first_block + tl.arange(0, BLOCK_M)
    live = block < blocks
    row, h, w = first_places(block, blocks, index_ptr, height, width, picked, SPAN)
    source, bits = row, row
    if bits_ptr is not None:
        bits = tl.load(bits_ptr + row, mask=live, other=0)
        source = row // width // clones * width + w
    out_row = row if index_ptr is None else block
    source_ptrs = x_ptr + source.to(tl.int64) * C
    for group in range(GROUPS):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        rest = tl.zeros([BLOCK_M, BLOCK_N2 if BLOCK_N2 > 0 else 16], tl.float32)
        acc, rest = taps_product(
            acc, rest, source_ptrs + group * IN, weight_ptr + group * (KH * WINDOW * IN * COLUMNS),
            h, w, live, bits, height, width,
            C, IN, KH, WINDOW, PAD_H, PAD_W, COLUMNS, BLOCK_N, BLOCK_N2, BLOCK_K, bits_ptr is not None,
        )  # fmt: skip
        group_bias_ptr = None if bias_ptr is None else bias_ptr + group * OUT
        group_out_ptr = r_ptr + group * OUT
        store_product(
            group_out_ptr, group_bias_ptr, acc, out_row, w, live, width, 0, OUTS, OUT, SPAN, BLOCK_N
        )
        if BLOCK_N2 > 0:
            store_product(
                group_out_ptr,
                group_bias_ptr,
                rest,
                out_row,
                w,
                live,
                width,
                BLOCK_N,
                OUTS,
                OUT,
                SPAN,
                BLOCK_N2,
            )

    # What other threads of the program have written is read from here on.
    tl.debug_barrier()
    last_block = tl.minimum(first_block + BLOCK_M, blocks)
    if index_ptr is None:
        first, _, _ = first_places(first_block, blocks, None, height, width, picked, SPAN)
        last, _, _ = first_places(last_block, blocks, None, height, width, picked, SPAN)
    else:
        first, last = first_block, last_block
    for start in tl.range(first, last, BLOCK_R, num_stages=1):
        # [BLOCK_R]
        at = start + tl.arange(0, BLOCK_R)
        there = at < last
        skip_row = at
        if RESIDUAL and index_ptr is not None:
            skip_row, _, _ = first_places(at, last, index_ptr, height, width, picked, 1)
        skip_ptr = x_ptr if RESIDUAL else None
        norm_gelu_rows(
            r_ptr, skip_ptr, y_ptr, at, skip_row, there, tl.full((), eps, tl.float32), OUTS, CHUNK, BLOCK_R
        )


@triton.jit(do_not_specialize=["rows", "width", "picked"])
def conv_block_fwd_kernel_norm(
    r_ptr,  # [rows, D]
    skip_ptr,  # [.., D] or None
    index_ptr,  # [N, picked] or None
    y_ptr,  # [rows, D], may be r
    rows,
    width,
    picked,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # [BLOCK_R]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    skip_row = row
    if skip_ptr is not None and index_ptr is not None:
        skip_row, _, _ = first_places(row, rows, index_ptr, 1, width, picked, 1)
    norm_gelu_rows(
        r_ptr, skip_ptr, y_ptr, row, skip_row, row < rows, tl.full((), eps, tl.float32), D, CHUNK, BLOCK_R
    )


def places_of(x: Tensor, masked: Tensor | None, index: Tensor | None) -> Places:
    """Where the outputs of x [N, H, W, C] are."""
    _, height, width, _ = x.shape
    samples = x.shape[0] if masked is None else masked.shape[0]
    return Places(samples, height, width, index)


def forward_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    residual: bool,
    eps: float,
    masked: Tensor | None,
    clones: int,
    index: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    samples = x.shape[0] if masked is None else masked.shape[0]
    middle = x.shape[1:3] if index is None else index.shape[1:]
    shape = (samples, *middle, weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


def _cost(*arguments: Any) -> _costs.Cost:
    *given, save = arguments
    return _costs.conv_block(*given, grad=(save,) * len(given))


@op_range("conv_block/fwd/triton", _cost)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    residual: bool,
    eps: float,
    masked: Tensor | None,
    clones: int,
    index: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y, and for backward the convolution's output r, which is empty unless `save`.

    x: [N, H, W, C], contiguous; [N / clones, 1, T, C] with masked [N, T]. weight: [O, C / groups, kh, kw].
    index: [N, R], outputs of the one line of a sample; y is [N, R, O] then, else [N, H, W, O].
    """
    y, saved = outputs = forward_outputs(x, weight, bias, groups, residual, eps, masked, clones, index, save)
    if y.numel() == 0:
        return outputs
    r = saved if save else y
    taps, places = Taps.of(weight, groups), places_of(x, masked, index)
    (bias,) = dense(bias)
    if taps.outer <= MOST_OWNED and _owned(taps, places, x.element_size()):
        _forward_rows(x, weight, bias, residual, eps, masked, clones, taps, places, r, y)
        return outputs
    launch_tiles(x, weight, taps, places, r, bias=bias, masked=masked, clones=clones)
    config = row_config("conv_block_fwd_kernel_norm", y, most=40)
    launch(
        conv_block_fwd_kernel_norm,
        (triton.cdiv(places.outputs, config["BLOCK_R"]),),
        r,
        x if residual else None,
        index,
        y,
        places.outputs,
        places.width,
        places.picked,
        eps,
        D=y.shape[-1],
        **config,
    )
    return outputs


def _owned(taps: Taps, places: Places, itemsize: int) -> bool:
    """Whether a program takes all groups of its rows in turn and then normalises them, in one launch.

    Otherwise the groups are programs of their own and the norm is a pass over what they leave in L2: more
    traffic, and `groups` times as many programs to fill the GPU with.
    """
    first = int(itemsize == 4)
    candidates = [{"OWNER": first}, {"OWNER": 1 - first}]
    return bool(choose(OWNER, owner_bucket(taps, places, itemsize), candidates)["OWNER"])


def owner_bucket(taps: Taps, places: Places, itemsize: int) -> str:
    """The bucket of the choice `OWNER`."""
    bucket = power_of_two_bucket(rows=places.outputs, D=taps.groups * taps.outer)
    return f"{bucket} bytes{itemsize} groups{taps.groups} taps{taps.kh * taps.kw}"


def _forward_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: bool,
    eps: float,
    masked: Tensor | None,
    clones: int,
    taps: Taps,
    places: Places,
    r: Tensor,
    y: Tensor,
) -> None:
    """Both phases in one launch."""
    name, itemsize, width = "conv_block_fwd_kernel_rows", x.element_size(), y.shape[-1]
    config = product_config(name, taps, places, itemsize, owner=True)
    chunk = chunk_width(width, itemsize, most=40)
    launch(
        conv_block_fwd_kernel_rows,
        (triton.cdiv(places.blocks(config["SPAN"]), config["BLOCK_M"]),),
        grouped(x, taps.groups),
        packed_weights(weight, taps, config, x.dtype),
        bias,
        places.index,
        tap_bits(masked, taps, config["SPAN"]),
        grouped(r, taps.groups),
        y,
        places.blocks(config["SPAN"]),
        places.height,
        places.width,
        places.picked,
        clones,
        eps,
        RESIDUAL=residual,
        CHUNK=chunk,
        BLOCK_R=max(1, config["num_warps"] * 512 // itemsize // chunk),
        **taps.constexprs,
        **config,
    )
