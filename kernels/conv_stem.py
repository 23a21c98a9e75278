"""Triton conv_stem: r = conv(x), n = (r - mean) rstd, h = n w + b, y = gelu(h), channels-last, no padding.

    dh = dy gelu'(h);  dr = rstd (dh w - mean(dh w) - n mean(dh w n));  dw, db = sums over rows of dh n, dh
    dx[p] = sum over taps j with p - j = t stride of dr[t] W_j;  dW_j = sum over rows of dr' x[t stride + j]

Layout: x [B, T, C] contiguous (else copied once), r, y and the gradients too; dy has two strides of its own.
An output row's window is k C values in a row of memory, and windows of neighbouring rows overlap, so the
convolution is a product [rows, k C] by [k C, O] whose left side exists nowhere but in x (_stem.py). Weights
are cast to x's dtype and repacked once a call; products of fp32 are exact ("ieee"), everything else fp32.

Two plans, with numbers for audio_base's layers in bf16 (12 s, B = 5):

1. Kept product (layers 1 to 6; k C > 16, or x wants a gradient). Layer 1: 95,995 rows, k C = 1,536, O = 512;
   151 GFLOP, 191 us at 790 TFLOP/s; x 197 MB, r and y 98 MB each.
   Forward (conv_stem_fwd.py): one kernel whose program owns BLOCK_M rows from product to output. The row does
   not stay in registers: 128 x 512 sums in fp32 are all 65,536 registers of a multiprocessor, and with 64
   rows the weights' 1.5 MB would come out of L2 1,500 times, 2.4 GB or 340 us. A program of 128 rows makes
   two tiles of 128 x 256 (weights 1.2 GB, windows 0.6 GB out of L2), writes them, and then reads its own
   128 KB of r again out of L2, whole rows at a time, for moments and norm: 393 MB, what x, r and y are.
   Norm and GELU as a second kernel would read r from memory: 491 MB.
   r is kept (98 MB written and read, 46 us) as making it again costs 191 us. Without gradients r is written
   where y will be, and y over it.
   Backward (conv_stem_bwd.py): GELU and norm in one pass (dy, r read; dr written), with the sums of dw and db
   in registers, a partial row for each of 256 programs. dr is then read by two products. dx: each program
   takes places of one residue modulo the stride, which meet ceil(taps / stride) frames: a gather, every place
   written once, no atomics. dW: 128 x 256 tiles over shares of the rows, fp32 partials that one kernel adds
   in their order. Bytes: dy, r, x read, dx, dr written, dr read twice: 884 MB, plus partials of 35 MB each
   way; the formula of _costs.py, which lets dr pass on chip, has 596 MB.
2. Wave (layer 0; k C <= 16, no gradient to x): 191,995 rows, k C = 10, y 197 MB. Bound by memory and, with
   16 to 24 instructions for GELU, by the ALUs; the product costs nearly nothing as one step of a matrix
   instruction, padded from 10 to 16. So r is never written: forward makes it twice (once for the moments,
   once for y), backward once more. Forward writes y, mean and rstd: 198 MB (keeping r: 395). Backward
   (_stem_wave.py) reads dy and makes all gradients in one sweep, without dr: 197 MB and a column of fp32 per
   32 channels, 24 MB, instead of the 788 MB of reading dy and r, writing dr and reading it.
   r is fp32 here, one rounding less than eager's.

The shares' number follows from the shape, so the bits do not depend on the GPU (unless tuned.json says so).
With and without gradients the forward kernels are compiled apart: on a GPU their results may differ in the
last bit.
"""

from typing import Any

import torch
from torch import Tensor

from d2vkern._derivatives import first_order
from d2vkern._library import define, needed
from d2vkern.kernels.conv_stem_bwd import backward, backward_outputs
from d2vkern.kernels.conv_stem_fwd import forward, forward_outputs

_fwd_op = define(
    "conv_stem_fwd(Tensor x, Tensor weight, int stride, Tensor norm_weight, Tensor norm_bias, float eps, "
    "bool save, bool into_x) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_outputs,
)
_bwd_op = define(
    "conv_stem_bwd(Tensor dy, Tensor x, Tensor r, Tensor mean, Tensor rstd, Tensor weight, int stride, "
    "Tensor norm_weight, Tensor norm_bias, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_outputs,
)


class _ConvStem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: int,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        into_x: bool,
    ) -> Tensor:
        y, *saved = _fwd_op(x, weight, stride, norm_weight, norm_bias, eps, True, into_x)
        ctx.save_for_backward(x, *saved, weight, norm_weight, norm_bias)
        ctx.stride = stride
        return y

    @staticmethod
    @first_order("conv_stem")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, mean, rstd, weight, norm_weight, norm_bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = [wanted[0], wanted[1], wanted[3], wanted[4]]
        gradients = _bwd_op(dy, x, r, mean, rstd, weight, ctx.stride, norm_weight, norm_bias, needs)
        dx, dw, dnw, dnb = needed(gradients, needs)
        return dx, dw, None, dnw, dnb, None, None


def conv_stem(
    x: Tensor, weight: Tensor, stride: int, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, norm_weight, norm_bias)):
        return _ConvStem.apply(x, weight, stride, norm_weight, norm_bias, eps, x.requires_grad)
    return _fwd_op(x, weight, stride, norm_weight, norm_bias, eps, False, False)[0]
