"""Regression targets in Triton: each layer normalised and added to one fp32 sum in one pass.

Formula: sum += (x - mean) / sqrt(variance + 1e-5), biased variance; the result is sum / layers, normalised
again. "instance" takes mean and variance over the T tokens of a sample and channel, "batch" over all B * T
tokens of a channel, "layer" over the D channels of a token.

Layout: layers [B, T, D] with any strides that are contiguous along D (extra tokens may be cut off as a view);
others cost a copy. The sum is [B, T, D] fp32, contiguous, updated in place; the first layer writes it without
reading. `finish` runs the same kernels with the sum as their input.

- `targets_fwd_kernel_tokens` ("instance"): a program owns all tokens of BLOCK_D channels of one sample and
  reads them three times, for the mean, the variance and the sum: once from memory, then from the processor's
  L1 cache (20 to 40 KB at the presets' shapes). Held in registers they would take so many that one or two
  programs fill a multiprocessor, and nothing overlaps; so it holds six of 40 registers. Tiles have four
  elements a thread: wider loads of 16-bit layers would have to change hands before they meet the fp32 sum.
- `targets_fwd_kernel_rows` ("layer" and none): a program owns BLOCK_R tokens, all channels.
- "batch" is two launches: `targets_fwd_kernel_batch_moments` sums up to PARTS shares of the tokens,
  `targets_fwd_kernel_batch` merges them in every program and normalises. A program owns a share and BLOCK_D
  channels.

Statistics are fp32 and of centred values, and what rounding left in a mean is taken out again (`slip`), so
large means cost nothing. Targets are constants: no backward. No norms: bit for bit eager's.

Bytes per layer: the layer once and the sum twice (once for the first layer), which is the floor; `finish`
moves the sum twice. Across layers the sum stays in the L2 cache, as far as it fits there. "batch" reads the
layer twice.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._library import define
from d2vkern._nvtx import op_range
from d2vkern.kernels._common import not_below_zero
from d2vkern.kernels._launch import launch
from d2vkern.kernels._moments import add_moments, merge_rows
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket
from d2vkern.reference.targets import EPS

PARTS = 64
"""most shares of the tokens of a batch"""


# Token counts change from batch to batch: nothing is compiled anew when one becomes divisible by 16.
@triton.jit(do_not_specialize=["tokens"])
def targets_fwd_kernel_tokens(
    x_ptr,  # [B, T, D]
    sum_ptr,  # [B, T, D] fp32, contiguous
    x_stride_b,
    x_stride_t,
    tokens,
    width,
    eps,
    FIRST: tl.constexpr,  # the sum is written, not read
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks = tl.cdiv(width, BLOCK_D)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    # [BLOCK_T], [BLOCK_D]
    t = tl.arange(0, BLOCK_T)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += sample * x_stride_b + d[None, :]
    sum_ptr += sample * tokens * width + d[None, :]
    share = tl.div_rn(1.0, tokens.to(tl.float32))

    # [BLOCK_T, BLOCK_D], then [BLOCK_D]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        x, _ = _tokens(x_ptr, start + t, d, x_stride_t, tokens, width)
        total += x
    mean = tl.sum(total, 0) * share
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        x, inside = _tokens(x_ptr, start + t, d, x_stride_t, tokens, width)
        centred = tl.where(inside, x - mean[None, :], 0.0)
        total += centred
        squares += centred * centred
    slip = tl.sum(total, 0) * share
    rstd = _rstd(tl.sum(squares, 0) * share - slip * slip, eps)
    for start in range(0, tokens, BLOCK_T):
        x, inside = _tokens(x_ptr, start + t, d, x_stride_t, tokens, width)
        y = (x - mean[None, :] - slip[None, :]) * rstd[None, :]
        _add(sum_ptr + (start + t).to(tl.int64)[:, None] * width, y, inside, FIRST)


@triton.jit
def _tokens(x_ptr, t, d, stride_t, tokens, width):
    """[BLOCK_T, BLOCK_D] fp32, tokens t of a sample, and which of it exists; the rest is 0."""
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    x = tl.load(x_ptr + t.to(tl.int64)[:, None] * stride_t, mask=inside, other=0.0)
    return x.to(tl.float32), inside


@triton.jit
def _rstd(variance, eps):
    root = tl.sqrt_rn(not_below_zero(variance) + tl.full((), eps, tl.float32))
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def _add(sum_ptr, y, inside, FIRST: tl.constexpr):
    # Past the processor's own cache, which the layer is about to be read from again.
    if not FIRST:
        y += tl.load(sum_ptr, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(sum_ptr, y, mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "layers"])
def targets_fwd_kernel_rows(
    x_ptr,  # [B, T, D]
    sum_ptr,  # [B * T, D] fp32, contiguous
    x_stride_b,
    x_stride_t,
    tokens,
    rows,
    width,
    eps,
    layers,
    NORM: tl.constexpr,  # LayerNorm over D
    AVERAGE: tl.constexpr,  # without it: x / layers
    FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
):
    # [BLOCK_R], [BLOCK_D]
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    # [BLOCK_R, BLOCK_D]
    x, inside = _rows(x_ptr, r, d, x_stride_b, x_stride_t, tokens, rows, width)
    if NORM:
        share = tl.div_rn(1.0, tl.cast(width, tl.float32))
        mean = tl.sum(x, 1) * share
        centred = tl.where(inside, x - mean[:, None], 0.0)
        slip = tl.sum(centred, 1) * share
        variance = tl.sum(centred * centred, 1) * share - slip * slip
        x = (centred - slip[:, None]) * _rstd(variance, eps)[:, None]
    elif AVERAGE:
        x = tl.div_rn(x, tl.zeros_like(x) + layers.to(tl.float32))
    _add(sum_ptr + r.to(tl.int64)[:, None] * width + d[None, :], x, inside, FIRST)


@triton.jit
def _rows(x_ptr, r, d, stride_b, stride_t, tokens, rows, width):
    """[BLOCK_R, BLOCK_D] fp32, tokens r of all samples one after another, and which of them exist."""
    inside = (r < rows)[:, None] & (d < width)[None, :]
    at = (r // tokens).to(tl.int64) * stride_b + (r % tokens).to(tl.int64) * stride_t
    x = tl.load(x_ptr + at[:, None] + d[None, :], mask=inside, other=0.0)
    return x.to(tl.float32), inside


@triton.jit(do_not_specialize=["tokens", "rows", "share"])
def targets_fwd_kernel_batch_moments(
    x_ptr,  # [B, T, D]
    mean_ptr,  # [parts, D] fp32, less x[0, 0]
    squares_ptr,  # [parts, D] fp32
    x_stride_b,
    x_stride_t,
    tokens,
    rows,
    share,  # tokens of a part
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks = tl.cdiv(width, BLOCK_D)
    part = tl.program_id(0) // chunks
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    reference = tl.load(x_ptr + d, mask=d < width, other=0.0).to(tl.float32)
    end = tl.minimum(rows, (part + 1) * share)
    count = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(part * share, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x, inside = _rows(x_ptr, r, d, x_stride_b, x_stride_t, tokens, end, width)
        x = tl.where(inside, x - reference[None, :], 0.0)
        count, mean, squares = add_moments(count, mean, squares, (r < end).to(tl.float32), x, None)
    _, mean, squares = merge_rows(count, mean, squares)
    at = part.to(tl.int64) * width + d
    tl.store(mean_ptr + at, mean, mask=d < width)
    tl.store(squares_ptr + at, squares, mask=d < width)


@triton.jit(do_not_specialize=["tokens", "rows", "share"])
def targets_fwd_kernel_batch(
    x_ptr,  # [B, T, D]
    sum_ptr,  # [B * T, D] fp32, contiguous
    mean_ptr,  # [parts, D] fp32, less x[0, 0]
    squares_ptr,  # [parts, D] fp32
    x_stride_b,
    x_stride_t,
    tokens,
    rows,
    share,
    width,
    eps,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,  # at least the parts
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunks = tl.cdiv(width, BLOCK_D)
    part = tl.program_id(0) // chunks
    # [BLOCK_P], [BLOCK_D]
    p = tl.arange(0, BLOCK_P)
    d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.maximum(tl.minimum(rows - p * share, share), 0)
    # [BLOCK_P, BLOCK_D]
    at = p.to(tl.int64)[:, None] * width + d[None, :]
    there = (count > 0)[:, None] & (d < width)[None, :]
    mean = tl.load(mean_ptr + at, mask=there, other=0.0)
    squares = tl.load(squares_ptr + at, mask=there, other=0.0)
    total, mean, squares = merge_rows(count.to(tl.float32), mean, squares)
    rstd = _rstd(squares / total, eps)
    reference = tl.load(x_ptr + d, mask=d < width, other=0.0).to(tl.float32)
    end = tl.minimum(rows, (part + 1) * share)
    for start in range(part * share, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        x, inside = _rows(x_ptr, r, d, x_stride_b, x_stride_t, tokens, end, width)
        y = (x - reference[None, :] - mean[None, :]) * rstd[None, :]
        _add(sum_ptr + r.to(tl.int64)[:, None] * width + d[None, :], y, inside, FIRST)


def accumulate(accumulator: Tensor | None, layer: Tensor, norm: str | None) -> Tensor:
    """Add one normalised layer [B,T,D] to the fp32 accumulator (in place; made when None) and return it."""
    if accumulator is None:
        total = layer.new_empty(layer.shape, dtype=torch.float32)
        _accumulate(total, layer, norm, True)
        return total
    _accumulate(accumulator, layer, norm, False)
    return accumulator


def finish(accumulator: Tensor, layers: int, final: str | None) -> Tensor:
    """Turn the sum of `layers` layers into their normalised average, in place."""
    _finish(accumulator, layers, final)
    return accumulator


@op_range(
    "targets/fwd/triton",
    lambda total, layer, norm, first: _costs.targets(None if first else total, layer, norm),
)
def _run_accumulate(total: Tensor, layer: Tensor, norm: str | None, first: bool) -> None:
    if layer.numel() > 0:
        layer = layer if layer.stride(-1) == 1 else layer.contiguous()
        _launch(layer, total, norm, first, 1)


@op_range("targets/fwd/triton", _costs.targets_finish)
def _run_finish(total: Tensor, layers: int, final: str | None) -> None:
    if total.numel() > 0 and (final is not None or layers > 1):
        _launch(total, total, final, True, layers)


def _launch(x: Tensor, total: Tensor, norm: str | None, first: bool, layers: int) -> None:
    """total = norm(x / layers), plus total unless `first`; x may be total.

    A norm of x / layers is that of x with eps * layers^2 for eps.
    """
    samples, tokens, width = x.shape
    rows, strides, eps = samples * tokens, x.stride()[:2], EPS * layers**2
    # A fused x - sum * share is another mean than the one subtracted next: equal values would not become 0.
    start = partial(launch, fp_fusion=False)
    if norm == "instance":
        bucket = power_of_two_bucket(B=samples, T=tokens, D=width, item=x.element_size())
        config = choose("targets_fwd_kernel_tokens", bucket, _token_tiles(samples * width))
        grid = (samples * triton.cdiv(width, config["BLOCK_D"]),)
        start(targets_fwd_kernel_tokens, grid, x, total, *strides, tokens, width, eps, FIRST=first, **config)
    elif norm == "batch":
        config = {"BLOCK_R": 32, "BLOCK_D": 64, "num_warps": 4}
        share = triton.cdiv(triton.cdiv(rows, PARTS), config["BLOCK_R"]) * config["BLOCK_R"]
        parts = triton.cdiv(rows, share)
        mean, squares = (x.new_empty((parts, width), dtype=torch.float32) for _ in range(2))
        grid = (parts * triton.cdiv(width, config["BLOCK_D"]),)
        sizes = (*strides, tokens, rows, share, width)
        start(targets_fwd_kernel_batch_moments, grid, x, mean, squares, *sizes, **config)
        flags = {"FIRST": first, "BLOCK_P": PARTS}
        start(targets_fwd_kernel_batch, grid, x, total, mean, squares, *sizes, eps, **flags, **config)
    else:
        block_d = triton.next_power_of_2(width)
        bucket = power_of_two_bucket(R=rows, D=width, item=x.element_size())
        config = choose("targets_fwd_kernel_rows", bucket, _row_tiles(block_d, x.element_size()))
        grid = (triton.cdiv(rows, config["BLOCK_R"]),)
        sizes = (*strides, tokens, rows, width, eps, layers)
        flags = {"NORM": norm == "layer", "AVERAGE": layers > 1, "FIRST": first, "BLOCK_D": block_d}
        start(targets_fwd_kernel_rows, grid, x, total, *sizes, **flags, **config)


def _token_tiles(channels: int) -> list[Config]:
    """Tiles of four elements a thread, for B * D channels."""
    tiles = [
        {"BLOCK_T": 32, "BLOCK_D": 32, "num_warps": 8},
        {"BLOCK_T": 64, "BLOCK_D": 16, "num_warps": 8},
        {"BLOCK_T": 16, "BLOCK_D": 32, "num_warps": 4},
        {"BLOCK_T": 32, "BLOCK_D": 16, "num_warps": 4},
        {"BLOCK_T": 64, "BLOCK_D": 32, "num_warps": 16},
    ]
    # Too few programs for a GPU's multiprocessors: narrower ones.
    return tiles if channels >= 256 * 32 else [tiles[1], tiles[0], *tiles[2:]]


def _row_tiles(block_d: int, item: int) -> list[Config]:
    """Rows of a program; of 16-bit layers four elements a thread, as in `_token_tiles`."""
    some = {"BLOCK_R": max(1, 4096 // block_d), "num_warps": max(4, min(16, block_d // 1024))}
    one = {"BLOCK_R": 1, "num_warps": max(1, min(16, block_d // 128))}
    return [some, one] if item == 4 else [one, some]


_accumulate = define(
    "targets_accumulate(Tensor(a!) total, Tensor layer, str? norm, bool first) -> ()",
    _run_accumulate,
    lambda total, layer, norm, first: None,
)
_finish = define(
    "targets_finish(Tensor(a!) total, SymInt layers, str? final) -> ()",
    _run_finish,
    lambda total, layers, final: None,
)
