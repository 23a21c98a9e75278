"""Eager conv_stem: y = gelu(LayerNorm(conv(x), weight, bias)), no padding, channels-last.

The convolution is a few matrix products over strided views, without im2col: `stride` neighbouring inputs of x
lie side by side in memory, so taps j*stride ... (j+1)*stride - 1 are one [T', stride*C] matrix whose rows do
not overlap. Kernel 3, stride 2 is two products, kernel 2 one. A first layer with few channels gathers its
windows (k * C values per frame, less than one output channel's worth) and is one product.

Saved for backward: x, the convolution's output, mean and rstd; LayerNorm and GELU are recomputed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2vkern import _costs
from d2vkern._nvtx import op_range

from ._autocast import without_autocast

_NARROW = 64  # window values below which gathering is cheaper than a second pass over the output


def _phases(kernel: int, stride: int, channels: int) -> list[tuple[int, int]]:
    """(first tap, taps) of each product."""
    if kernel * channels <= _NARROW:
        return [(0, kernel)]
    return [(tap, min(stride, kernel - tap)) for tap in range(0, kernel, stride)]


def _window(x_TC: Tensor, first: int, taps: int, frames: int, stride: int) -> Tensor:
    """[T', taps*C] view of one sample: row t holds inputs t*stride + first ... + taps - 1."""
    c = x_TC.shape[1]
    return x_TC.reshape(-1)[first * c :].as_strided((frames, taps * c), (stride * c, 1))


def _matrix(weight: Tensor, first: int, taps: int) -> Tensor:
    """[taps*C, Cout] of weight [Cout, C, k]."""
    return weight[:, :, first : first + taps].permute(2, 1, 0).reshape(-1, weight.shape[0])


class _ConvStem(torch.autograd.Function):
    @staticmethod
    @op_range("conv_stem/fwd/eager", _costs.conv_stem)
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: int, norm_weight: Tensor, norm_bias: Tensor, eps: float
    ) -> Tensor:
        (b, t, c), (cout, _, k) = x.shape, weight.shape
        frames = (t - k) // stride + 1
        w = weight.to(x.dtype)
        r = x.new_empty((b, frames, cout))
        for n, (first, taps) in enumerate(_phases(k, stride, c)):
            matrix = _matrix(w, first, taps)
            for i in range(b):
                window = _window(x[i], first, taps, frames, stride)
                if n == 0:
                    torch.mm(window, matrix, out=r[i])
                else:
                    r[i].addmm_(window, matrix)
        nw, nb = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
        h, mean, rstd = torch.native_layer_norm(r, (cout,), nw, nb, eps)
        ctx.save_for_backward(x, r, mean, rstd, weight, norm_weight, norm_bias)
        ctx.settings = (stride, frames, eps)
        return F.gelu(h)

    @staticmethod
    @once_differentiable
    @without_autocast
    @op_range("conv_stem/bwd/eager")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, mean, rstd, weight, norm_weight, norm_bias = ctx.saved_tensors
        stride, frames, eps = ctx.settings
        needs = ctx.needs_input_grad
        (b, _, c), (cout, _, k) = x.shape, weight.shape
        nw, nb = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
        h = F.layer_norm(r, (cout,), nw, nb, eps)
        dh = torch.ops.aten.gelu_backward(dy.contiguous(), h)
        del h
        dr, dnw, dnb = torch.ops.aten.native_layer_norm_backward(
            dh, r, (cout,), mean, rstd, nw, nb, [True, True, True]
        )
        del dh
        dx = torch.zeros_like(x) if needs[0] else None
        parts = []
        w = weight.to(x.dtype)
        for first, taps in _phases(k, stride, c):
            matrix = _matrix(w, first, taps)
            part = x.new_zeros((taps * c, cout))
            for i in range(b):
                if needs[1]:
                    part.addmm_(_window(x[i], first, taps, frames, stride).t(), dr[i])
                # as_strided views of what is written cannot be traced
                if dx is not None and taps <= stride and not torch.compiler.is_compiling():
                    _window(dx[i], first, taps, frames, stride).addmm_(dr[i], matrix.t())
                elif dx is not None:
                    _add_windows(dx[i], dr[i] @ matrix.t(), first, taps, stride)
            parts.append(part.view(taps, c, cout))
        dw = torch.cat(parts).permute(2, 1, 0).to(weight.dtype) if needs[1] else None
        return dx, dw, None, dnw.to(norm_weight.dtype), dnb.to(norm_bias.dtype), None


def _add_windows(dx_TC: Tensor, dwindow: Tensor, first: int, taps: int, stride: int) -> None:
    """Add the gradient of `_window` [T', taps*C] to its input, tap by tap: a tap's places are distinct."""
    frames, c = dwindow.shape[0], dx_TC.shape[1]
    for tap in range(taps):
        start = first + tap
        dx_TC[start : start + (frames - 1) * stride + 1 : stride].add_(dwindow[:, tap * c : (tap + 1) * c])


@without_autocast
def conv_stem(
    x: Tensor, weight: Tensor, stride: int, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
) -> Tensor:
    return _ConvStem.apply(x.contiguous(), weight, stride, norm_weight, norm_bias, eps)
