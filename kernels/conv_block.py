"""Triton conv_block: r = conv(x) + bias, n = (r - mean) rstd, y = gelu(n) (+ x), norm over channels.

    dn = dy gelu'(n);  dr = rstd (dn - mean(dn) - n mean(dn n));  dbias = sum of dr over places
    dx[t] = sum over taps of w[tap]' dr[t - tap] (+ dy);  dweight[tap] = sum over places of x[t + tap] dr[t]'

Layout: everything channels-last and contiguous (x is copied otherwise); a sequence is an image of one line.
Products as in _taps.py: rows shifted by taps, K = (tap, channel), weights packed once per call and direction.
Accumulation in fp32; fp32 inputs multiply in fp32 ("ieee"). r is rounded to x's dtype when stored, and both
directions take mean and rstd from what was stored; the variance is that of the centred values.

Forward (conv_block_fwd.py). A program makes one tile of rows and columns of one group of r, and the norm is a
launch of its own that reads r back. The other way, for up to 128 outputs a group and the default in fp32: a
program owns BLOCK_M blocks of SPAN places, makes one group after another, writes them to r, and then, behind
a barrier, reads its rows of r back from cache, eight or so at a time, and writes y. That moves a pass less,
but has a sixteenth of the programs in the presets: on an H200 it made image_base's forward and backward 4%
slower, those of audio_base's decoder 14%. Without gradients r is written into y and normalised there.

Backward (conv_block_bwd.py, _taps_weight.py). One pass makes dr and partial column sums for dbias, with mean
and rstd made again (the row is in registers anyway). dx is the tiles' product with mirrored taps, dy added in
its epilogue. dweight is split over rows into fp32 partials that a last kernel adds in order. No atomics.

plan: rows of x [B, T, C] are read by every version, masked taps skipped by a table of bits. dx sums over the
versions inside one accumulator, in order; what was masked in a version adds nothing. Kernels beyond 29 taps
do not fit the bits: then the masked versions are formed.
rows: forward and dweight do the asked outputs only. dr is written at every place, 0 where nothing was asked,
so that dx is the plain product; it multiplies those zeros (2.1 times the useful FLOPs of text's last layer).

Bytes, in passes over [places, channels] in x's dtype (the floor: _costs.conv_block):
    forward    x read, r and y written, r read again by the norm: 4; where programs own rows 3, the floor
    dr         dy and r read, dr written: 3
    dx         dr read, dx written: 2, with residual dy read: 3
    dweight    x and dr read: 2
               backward together 7, with residual 8; the floor counts 4, as if one program could hold a row,
               its neighbours and all weights
    weights    read in their own dtype, written and read packed, once per direction; dweight written
    partials   2 fp32 copies of the weights a share, an eighth of the rows' bytes at most in groups

r is saved: 1 pass written and 1 read, where making it again is the whole product. mean and rstd are not: 8
bytes a row each way buy nothing where the row is read as a whole.

At image_base (50,176 places, 768 channels, 3x3, bf16) forward moves 388 MB, backward 647 MB (90 and 150 us at
4.3 TB/s) beside 33 and 67 GFLOP; at text_base (65,536, dense k=9) 445 and 940 MB beside 0.70 and 1.39 TFLOP.
"""

from typing import Any

import torch
from torch import Tensor

from d2vkern._derivatives import first_order
from d2vkern._library import define
from d2vkern.kernels._taps import MOST_TAPS
from d2vkern.kernels.conv_block_bwd import backward, backward_outputs
from d2vkern.kernels.conv_block_fwd import forward, forward_outputs
from d2vkern.ops.masks import MaskPlan

_PARAMETERS = (
    "Tensor weight, Tensor? bias, int groups, bool residual, float eps, Tensor? masked, SymInt clones, "
    "Tensor? index"
)
_fwd_op = define(
    f"conv_block_fwd(Tensor x, {_PARAMETERS}, bool save) -> (Tensor, Tensor)", forward, forward_outputs
)
_bwd_op = define(
    f"conv_block_bwd(Tensor dy, Tensor x, Tensor r, {_PARAMETERS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    backward,
    backward_outputs,
)


class _ConvBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        residual: bool,
        eps: float,
        masked: Tensor | None,
        clones: int,
        index: Tensor | None,
    ) -> Tensor:
        y, r = _fwd_op(x, weight, bias, groups, residual, eps, masked, clones, index, True)
        ctx.save_for_backward(x, r, weight, bias, masked, index)
        ctx.settings = (groups, residual, eps, clones)
        return y

    @staticmethod
    @first_order("conv_block")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, weight, bias, masked, index = ctx.saved_tensors
        groups, residual, eps, clones = ctx.settings
        needs = list(ctx.needs_input_grad[:3])
        gradients = _bwd_op(dy, x, r, weight, bias, groups, residual, eps, masked, clones, index, needs)
        wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (*wanted, None, None, None, None, None, None)


def _conv_block(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """x [N, H, W, C], weight [O, C / groups, kh, kw]."""
    tensors = (x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ConvBlock.apply(*tensors, *settings)
    return _fwd_op(*tensors, *settings, False)[0]


def conv_block_1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    residual: bool = False,
    eps: float = 1e-5,
    plan: MaskPlan | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    masked = None if plan is None else plan.mask
    clones = 1 if plan is None else plan.clones
    if plan is not None and weight.shape[2] > MOST_TAPS - 3:
        # More taps than bits, even of two outputs a block: the masked versions are formed.
        (b, t, c), keep = x.shape, (~plan.mask).view(-1, clones, plan.mask.shape[1], 1)
        x, masked, clones = (x.unsqueeze(1) * keep).view(b * clones, t, c), None, 1
    index = None if rows is None else rows.contiguous()
    y = _conv_block(
        x.contiguous().unsqueeze(1), weight.unsqueeze(2), bias, groups, residual, eps, masked, clones, index
    )
    return y.squeeze(1) if rows is None else y


def conv_block_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    residual: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    return _conv_block(x.contiguous(), weight, bias, groups, residual, eps, None, 1, None)
