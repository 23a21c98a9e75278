"""Eager conv_block: channels-last convolution (same padding) -> LayerNorm -> exact GELU (-> + x).

    r = conv(x) + bias;  h = (r - mean) * rstd;  y = gelu(h) (+ x)

Saved for backward: x, r, mean and rstd; h and GELU's gradient are recomputed. Padding is kernel // 2 on both
sides and an even kernel drops the last output, as the original's SamePad does. Both forms run as one 2-D
convolution over a channels-last view, so nothing is transposed but where `_planes` says so.

With `plan`, x is [B, T, C] and every masked version reads it with its masked places zeroed: that [N, T, C]
input lives only while a convolution runs and is rebuilt in backward. With `rows`, outputs exist at those
places only, as one matrix product per tap over the gathered rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._nvtx import op_range

from ..ops.masks import MaskPlan
from ._autocast import without_autocast
from ._common import sum_dtype
from ._layer_norm import layer_norm, layer_norm_backward


def _planes(x_NHWC: Tensor, groups: int) -> Tensor:
    """[N,C,H,W] view for a convolution. Dense 1-D ones in fp32 on a CPU get a channels-first copy: on
    channels-last memory oneDNN sums all taps and channels in one chain, at four times the rounding error.
    """
    x = x_NHWC.permute(0, 3, 1, 2)
    chained = groups == 1 and x.shape[2] == 1 and x.dtype == torch.float32 and x.device.type == "cpu"
    return x.contiguous() if chained else x


@torch.compiler.assume_constant_result
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN has convolutions of a 16-bit dtype on this processor."""
    onednn, ops = torch.backends.mkldnn, torch.ops.mkldnn
    if not (onednn.is_available() and onednn.enabled):
        return False
    has = ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported()
    return bool(has)


def _is_summed_low(x: Tensor) -> bool:
    """Whether torch's convolutions add samples up in 16 bits: on a CPU whose oneDNN has none of the dtype."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _onednn_has(x.dtype)


def _conv(x_NHWC: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """[N,H,W,C] -> [N,H,W,Cout], contiguous."""
    if x_NHWC.numel() == 0:
        return x_NHWC.new_zeros((*x_NHWC.shape[:3], weight.shape[0]))
    if _is_summed_low(x_NHWC):
        wide = None if bias is None else bias.float()
        return _conv(x_NHWC.float(), weight.float(), wide, groups).to(x_NHWC.dtype)
    pad = (weight.shape[2] // 2, weight.shape[3] // 2)
    out = F.conv2d(_planes(x_NHWC, groups), weight, bias, padding=pad, groups=groups).permute(0, 2, 3, 1)
    return out[:, : x_NHWC.shape[1], : x_NHWC.shape[2]].contiguous()


def _conv_backward(
    dr_NHWC: Tensor, x_NHWC: Tensor, weight: Tensor, groups: int, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `_conv` to x and weight."""
    if x_NHWC.numel() == 0:
        return torch.zeros_like(x_NHWC) if needs[0] else None, torch.zeros_like(weight) if needs[1] else None
    if _is_summed_low(x_NHWC):
        dx, dw = _conv_backward(dr_NHWC.float(), x_NHWC.float(), weight.float(), groups, needs)
        return None if dx is None else dx.to(x_NHWC.dtype), None if dw is None else dw.to(weight.dtype)
    kh, kw = weight.shape[2], weight.shape[3]
    if kh % 2 == 0 or kw % 2 == 0:  # the dropped outputs had no gradient
        dr_NHWC = F.pad(dr_NHWC, (0, 0, 0, 1 - kw % 2, 0, 1 - kh % 2))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        _planes(dr_NHWC, groups), _planes(x_NHWC, groups), weight, None,
        (1, 1), (kh // 2, kw // 2), (1, 1), False, (0, 0), groups, [needs[0], needs[1], False],
    )  # fmt: skip
    return (dx.permute(0, 2, 3, 1) if needs[0] else None), (dw if needs[1] else None)


def _expand(x_BTC: Tensor, masked_NT: Tensor, clones: int) -> Tensor:
    """[B,T,C] -> [N,T,C], zero at masked places."""
    b, t, c = x_BTC.shape
    return x_BTC.unsqueeze(1).masked_fill(masked_NT.view(b, clones, t, 1), 0).view(b * clones, t, c)


def _rows_conv(x_NTC: Tensor, weight: Tensor, bias: Tensor | None, groups: int, index: Tensor) -> Tensor:
    """Convolution outputs at `index` [N*R] (flat places in the padded [N, T+k-1] grid): [N*R, Cout]."""
    k, cout = weight.shape[3], weight.shape[0]
    padded = F.pad(x_NTC, (0, 0, k // 2, (k - 1) // 2 + (1 - k % 2))).flatten(0, 1)
    w_KGIO = weight[:, :, 0].view(groups, cout // groups, -1, k).permute(3, 0, 2, 1)
    out = index.new_zeros((groups, index.shape[0], cout // groups), dtype=sum_dtype(x_NTC.dtype))
    for tap in range(k):
        taken = (
            padded.index_select(0, index + tap).view(-1, groups, padded.shape[1] // groups).transpose(0, 1)
        )
        if out.dtype != taken.dtype:
            out += torch.bmm(taken, w_KGIO[tap])
        elif groups == 1:
            out[0].addmm_(taken[0], w_KGIO[tap, 0])
        else:
            out.baddbmm_(taken, w_KGIO[tap])
    flat = out[0] if groups == 1 else out.transpose(0, 1).reshape(-1, cout)
    return (flat if bias is None else flat.add_(bias)).to(x_NTC.dtype)


def _rows_conv_backward(
    dr_RC: Tensor, x_NTC: Tensor, weight: Tensor, groups: int, index: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `_rows_conv`, of x in fp32 for 16-bit ones; each tap's rows are distinct, so the additions
    have a fixed order."""
    (n, t, c), k, cout = x_NTC.shape, weight.shape[3], weight.shape[0]
    left, right = k // 2, (k - 1) // 2 + (1 - k % 2)
    padded = F.pad(x_NTC, (0, 0, left, right)).flatten(0, 1) if needs[1] else None
    dr_GRO = dr_RC.view(-1, groups, cout // groups).transpose(0, 1)
    w_KGOI = weight[:, :, 0].view(groups, cout // groups, c // groups, k).permute(3, 0, 1, 2)
    wide = sum_dtype(x_NTC.dtype)
    dpadded = x_NTC.new_zeros((n * (t + k - 1 + (1 - k % 2)), c), dtype=wide) if needs[0] else None
    dw = x_NTC.new_empty((k, groups, cout // groups, c // groups)) if needs[1] else None
    for tap in range(k):
        if dw is not None and padded is not None:
            taken = padded.index_select(0, index + tap).view(-1, groups, c // groups).transpose(0, 1)
            torch.bmm(dr_GRO.transpose(1, 2), taken, out=dw[tap])
        if dpadded is not None:
            dtaken = torch.bmm(dr_GRO, w_KGOI[tap]).transpose(0, 1).reshape(-1, c)
            dpadded.index_add_(0, index + tap, dtaken.to(wide))
    dx = None if dpadded is None else dpadded.view(n, t + left + right, c)[:, left : left + t].contiguous()
    return dx, None if dw is None else dw.permute(1, 2, 3, 0).reshape(cout, c // groups, 1, k)


class _ConvBlock(torch.autograd.Function):
    @staticmethod
    @op_range("conv_block/fwd/eager", _costs.conv_block)
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
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        if index is not None:
            r = _rows_conv(x[:, 0], w, b, groups, index)
            skip = (
                x[:, 0].flatten(0, 1).index_select(0, _unpadded(index, x.shape[2], w.shape[3]))
                if residual
                else None
            )
        else:
            source = x if masked is None else _expand(x[:, 0], masked, clones).unsqueeze(1)
            r = _conv(source, w, b, groups)
            skip = source if residual else None
        h, mean, rstd = layer_norm(r, None, None, eps)
        y = F.gelu(h)
        if skip is not None:
            # torch 2.11 compiles the addition in place to wrong gradients
            y = y + skip if torch.compiler.is_compiling() else y.add_(skip)
        ctx.save_for_backward(x, r, mean, rstd, weight, bias, masked, index)
        ctx.settings = (groups, residual, clones, eps)
        return y

    @staticmethod
    @first_order("conv_block")
    @without_autocast
    @op_range("conv_block/bwd/eager")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, r, mean, rstd, weight, bias, masked, index = ctx.saved_tensors
        groups, residual, clones, eps = ctx.settings
        needs = ctx.needs_input_grad
        dy = dy.contiguous()
        h = F.layer_norm(r, r.shape[-1:], eps=eps)
        dh = torch.ops.aten.gelu_backward(dy, h)
        del h
        dr = layer_norm_backward(dh, r, mean, rstd, None, None)[0]
        del dh
        w = weight.to(x.dtype)
        db = dr.flatten(0, -2).sum(0, dtype=bias.dtype) if bias is not None and needs[2] else None
        if index is not None:
            dx, dw = _rows_conv_backward(dr, x[:, 0], w, groups, index, (needs[0], needs[1]))
            if dx is not None:
                if residual:
                    places = _unpadded(index, x.shape[2], w.shape[3])
                    dx.view(-1, dx.shape[-1]).index_add_(0, places, dy.to(dx.dtype))
                dx = dx.unsqueeze(1).to(x.dtype)
        else:
            source = x if masked is None else _expand(x[:, 0], masked, clones).unsqueeze(1)
            dx, dw = _conv_backward(dr, source, w, groups, (needs[0], needs[1]))
            if dx is not None and residual:
                in_place = dx.is_contiguous() and not torch.compiler.is_compiling()
                dx = dx.add_(dy) if in_place else dx + dy
            if dx is not None and masked is not None:
                n, _, t, c = source.shape
                dx = dx.reshape(n // clones, clones, t, c)
                dx = dx.masked_fill_(masked.view(n // clones, clones, t, 1), 0)
                total = dx[:, 0].to(sum_dtype(dx.dtype), copy=True)
                for m in range(1, clones):
                    total += dx[:, m]
                dx = total.unsqueeze(1).to(x.dtype)
        return dx, None if dw is None else dw.to(weight.dtype), db, None, None, None, None, None, None


def _unpadded(index: Tensor, tokens: int, kernel: int) -> Tensor:
    """Flat places in [N, T] of flat places in the padded grid."""
    padded = tokens + kernel - 1 + (1 - kernel % 2)
    return index // padded * tokens + index % padded


@without_autocast
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
    index = None
    if rows is not None:
        k = weight.shape[2]
        padded = x.shape[1] + k - 1 + (1 - k % 2)
        index = (rows.long() + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * padded).flatten()
    y = _ConvBlock.apply(
        x.contiguous().unsqueeze(1), weight.unsqueeze(2), bias, groups, residual, eps, masked, clones, index
    )
    return y.squeeze(1) if rows is None else y.view(*rows.shape, weight.shape[0])


@without_autocast
def conv_block_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    residual: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    return _ConvBlock.apply(x.contiguous(), weight, bias, groups, residual, eps, None, 1, None)
