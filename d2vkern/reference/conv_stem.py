"""Eager conv_stem: y = gelu(LayerNorm(conv(x), weight, bias)), no padding, channels-last.

The convolution is a few matrix products over strided views, without im2col: `stride` neighbouring inputs of x
lie side by side in memory, so taps j*stride ... (j+1)*stride - 1 are one [T', stride*C] matrix whose rows do
not overlap. Kernel 3, stride 2 is two products, kernel 2 one. A first layer with few channels gathers its
windows (k * C values per frame, less than one output channel's worth) and is one product.

Saved for backward: x, the convolution's output, mean and rstd; LayerNorm and GELU are recomputed. On a CPU
all of it runs block by block of frames, so that only x, the convolution's output and y pass through memory.
What several products or blocks add to is summed in fp32 (fp64 for fp64).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._nvtx import op_range

from ._autocast import without_autocast
from ._common import sum_dtype
from ._layer_norm import layer_norm, layer_norm_backward

ProductInto = Callable[[Tensor, Tensor, Tensor, bool], None]
"""out [m, n], a [m, k], b [k, n], add: out = a b, or out += a b"""
_BLOCK_BYTES = 1 << 23
"""of the convolution's output worked on at a time on a CPU, so that norm and GELU find it in the cache"""
_NARROW = 64
"""window values below which gathering is cheaper than a second pass over the output"""


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
    return weight[:, :, first : first + taps].permute(2, 1, 0).flatten(0, 1)


def _blocks(x: Tensor, frames: int, width: int) -> list[tuple[int, int, int]]:
    """(sample, first frame, end) of what is worked on at a time.

    On a CPU so few frames that norm and GELU find them in its cache; elsewhere, and where a compiler fuses
    them, whole samples.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [(i, 0, frames) for i in range(x.shape[0])]
    rows = max(1, _BLOCK_BYTES // max(1, width * x.element_size()))
    starts = range(0, frames, rows)
    return [(i, start, min(start + rows, frames)) for i in range(x.shape[0]) for start in starts]


def _add_product(product_into: ProductInto, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a b, or out += a b, where out may be wider than the factors."""
    if out.dtype == a.dtype:
        product_into(out, a, b, add)
        return
    part = a.new_empty(out.shape)
    product_into(part, a, b, False)
    if add:
        out += part
    else:
        out.copy_(part)


def with_products(backend: str, product_into: ProductInto) -> Callable[..., Tensor]:
    """conv_stem whose matrix products are these; `backend` names its ranges."""

    class _ConvStem(torch.autograd.Function):
        @staticmethod
        @op_range(f"conv_stem/fwd/{backend}", _costs.conv_stem)
        def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            stride: int,
            norm_weight: Tensor,
            norm_bias: Tensor,
            eps: float,
        ) -> Tensor:
            (b, t, c), (cout, _, k) = x.shape, weight.shape
            frames = (t - k) // stride + 1
            w, nw, nb = weight.to(x.dtype), norm_weight.to(x.dtype), norm_bias.to(x.dtype)
            products = [(first, taps, _matrix(w, first, taps)) for first, taps in _phases(k, stride, c)]
            r, y = x.new_empty((b, frames, cout)), x.new_empty((b, frames, cout))
            wide = x.dtype if len(products) == 1 else sum_dtype(x.dtype)
            moments = []
            for i, start, end in _blocks(x, frames, cout):
                rows = r[i, start:end]
                total = rows if wide == x.dtype else rows.new_empty(rows.shape, dtype=wide)
                for n, (first, taps, matrix) in enumerate(products):
                    window = _window(x[i], start * stride + first, taps, end - start, stride)
                    _add_product(product_into, total, window, matrix, n > 0)
                if total is not rows:
                    rows.copy_(total)
                h, mean, rstd = layer_norm(rows, nw, nb, eps)
                y[i, start:end] = F.gelu(h)
                moments += [mean, rstd]
            ctx.save_for_backward(x, r, weight, norm_weight, norm_bias, *moments)
            ctx.settings = (stride, eps)
            return y

        @staticmethod
        @first_order("conv_stem")
        @without_autocast
        @op_range(f"conv_stem/bwd/{backend}")
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, r, weight, norm_weight, norm_bias, *moments = ctx.saved_tensors
            stride, eps = ctx.settings
            needs = ctx.needs_input_grad
            c, (cout, _, k) = x.shape[2], weight.shape
            w, nw, nb = weight.to(x.dtype), norm_weight.to(x.dtype), norm_bias.to(x.dtype)
            products = [(first, taps, _matrix(w, first, taps)) for first, taps in _phases(k, stride, c)]
            wide = sum_dtype(x.dtype)
            parts = [x.new_zeros((taps * c, cout), dtype=wide) for _, taps, _ in products]
            # where windows overlap, or more than one product reads an input, its gradient is a sum
            summed = wide if len(products) > 1 or k > stride else x.dtype
            dx = torch.zeros_like(x) if needs[0] else None
            dnw, dnb = (x.new_zeros(cout, dtype=wide) for _ in range(2))
            for n, (i, start, end) in enumerate(_blocks(x, r.shape[1], cout)):
                rows, (mean, rstd) = r[i, start:end], moments[2 * n : 2 * n + 2]
                h = F.layer_norm(rows, (cout,), nw, nb, eps)
                dh = torch.ops.aten.gelu_backward(dy[i, start:end].contiguous(), h)
                dr, some_nw, some_nb = layer_norm_backward(dh, rows, mean, rstd, nw, nb)
                dnw += some_nw
                dnb += some_nb
                if dx is not None and start == 0:
                    dx_TC = dx[i] if summed == x.dtype else torch.zeros_like(x[i], dtype=summed)
                for part, (first, taps, matrix) in zip(parts, products, strict=True):
                    at = start * stride + first
                    if needs[1]:
                        _add_product(
                            product_into, part, _window(x[i], at, taps, end - start, stride).t(), dr, True
                        )
                    # as_strided views of what is written cannot be traced
                    if dx is not None and taps <= stride and not torch.compiler.is_compiling():
                        window = _window(dx_TC, at, taps, end - start, stride)
                        _add_product(product_into, window, dr, matrix.t(), True)
                    elif dx is not None:
                        dwindow = dr.new_empty(dr.shape[0], matrix.shape[0])
                        product_into(dwindow, dr, matrix.t(), False)
                        _add_windows(dx_TC, dwindow, at, taps, stride)
                if dx is not None and summed != x.dtype and end == r.shape[1]:
                    dx[i] = dx_TC
            dw = None
            if needs[1]:
                dw = torch.cat(parts).view(k, c, cout).permute(2, 1, 0).to(weight.dtype)
            return dx, dw, None, dnw.to(norm_weight.dtype), dnb.to(norm_bias.dtype), None

    @without_autocast
    def conv_stem(
        x: Tensor, weight: Tensor, stride: int, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-5
    ) -> Tensor:
        if torch.compiler.is_exporting():  # the loop over samples would fix their number
            out = F.conv1d(x.transpose(1, 2), weight.to(x.dtype), stride=stride).transpose(1, 2)
            return F.gelu(layer_norm(out, norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)[0])
        return _ConvStem.apply(x.contiguous(), weight, stride, norm_weight, norm_bias, eps)

    return conv_stem


def _add_windows(dx_TC: Tensor, dwindow: Tensor, first: int, taps: int, stride: int) -> None:
    """Add the gradient of `_window` [T', taps*C] to its input, tap by tap: a tap's places are distinct."""
    frames, c = dwindow.shape[0], dx_TC.shape[1]
    for tap in range(taps):
        start = first + tap
        dx_TC[start : start + (frames - 1) * stride + 1 : stride].add_(dwindow[:, tap * c : (tap + 1) * c])


def _product_into(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


conv_stem = with_products("eager", _product_into)
