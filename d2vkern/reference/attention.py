"""Eager multimask_attention: softmax(q k' * scale + bias) v, packed in and out, a few sequences at a time.

    bias_ij = -slope_h * max(alibi_scale_h, 0) * |pos_i - pos_j|, 0 where either position is -1

Only qkv (and the small arguments) are saved: backward recomputes the probabilities chunk by chunk, so no
[N, H, S, S] tensor outlives its chunk. A chunk's scores take about 1 MB, which on a CPU stay in cache; one
long sequence is a chunk and is read where it lies, several short ones are copied head by head. Softmax is
in fp32 (fp64 for fp64). The gradient of alibi_scale is summed chunk after chunk, in order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._nvtx import op_range

from ._autocast import without_autocast
from ._common import sum_dtype
from ._dropout import fresh_seed, keep_mask

CHUNK_BYTES = 1 << 20


class _Inputs(NamedTuple):
    qkv: Tensor  # [N,S,3,H,Dh]
    positions: Tensor | None  # [N,S]
    slopes: Tensor | None  # [H]
    alibi_scale: Tensor | None  # [H]
    lengths: Tensor | None  # [N]


class _Settings(NamedTuple):
    scale: float
    dropout_p: float
    seed: int | Tensor | None  # counter-based dropout
    local_seed: int  # dropout from torch's generator, repeated in backward
    zero_padded: bool


class _Attention(torch.autograd.Function):
    @staticmethod
    @op_range("attention/fwd/eager", _costs.attention)
    def forward(
        ctx: Any,
        qkv: Tensor,
        positions: Tensor | None,
        slopes: Tensor | None,
        alibi_scale: Tensor | None,
        lengths: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        n, s, _, h, d = qkv.shape
        given = _Inputs(qkv, positions, slopes, alibi_scale, lengths)
        ctx.save_for_backward(*given)
        ctx.settings = settings
        out = qkv.new_empty((n, s, h * d))
        for chunk in _chunks(n, s, h):
            _, _, v, p, dropped, _ = _probabilities(given, settings, chunk)
            if dropped is not None:
                p, v = p.masked_fill_(dropped, 0), v / (1 - settings.dropout_p)
            o = torch.bmm(p.to(v.dtype).flatten(0, 1), v)
            out[chunk].view(-1, s, h, d).copy_(o.view(-1, h, s, d).transpose(1, 2))
        if lengths is not None and settings.zero_padded:
            out.masked_fill_(is_padded(lengths, s).unsqueeze(2), 0)
        return out

    @staticmethod
    @first_order("attention")
    @without_autocast
    @op_range("attention/bwd/eager")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given, settings = _Inputs(*ctx.saved_tensors), ctx.settings
        qkv, _, slopes, alibi_scale, lengths = given
        n, s, _, h, d = qkv.shape
        dqkv = qkv.new_empty(qkv.shape)
        needs_scale = alibi_scale is not None and ctx.needs_input_grad[3]
        dscale = qkv.new_zeros((h, 1), dtype=sum_dtype(qkv.dtype)) if needs_scale else None
        for chunk in _chunks(n, s, h):
            q, k, v, p, dropped, distance = _probabilities(given, settings, chunk)
            do = dout[chunk].reshape(-1, s, h, d)
            if lengths is not None and settings.zero_padded:
                do = do.masked_fill(is_padded(lengths[chunk], s)[:, :, None, None], 0)
            if dropped is not None:
                do = do / (1 - settings.dropout_p)
            do = _heads(do)
            dp = torch.bmm(do, v.transpose(1, 2)).view(p.shape).to(p.dtype)
            kept = p
            if dropped is not None:
                dp, kept = dp.masked_fill_(dropped, 0), p.masked_fill(dropped, 0)
            dv = torch.bmm(kept.to(v.dtype).flatten(0, 1).transpose(1, 2), do)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            if dscale is not None and distance is not None:
                dscale -= torch.bmm(ds.flatten(2), distance.flatten(1).unsqueeze(2)).sum(0)
            ds = ds.to(q.dtype).flatten(0, 1)
            dq = torch.bmm(ds, k).mul_(settings.scale)
            dk = torch.bmm(ds.transpose(1, 2), q)  # q is scaled already
            part = dqkv[chunk]
            for slot, grad in enumerate((dq, dk, dv)):
                part[:, :, slot].copy_(grad.view(-1, h, s, d).transpose(1, 2))
        if dscale is None or slopes is None or alibi_scale is None:
            return dqkv, None, None, None, None, None
        dscale = torch.where(alibi_scale < 0, 0.0, dscale.flatten() * slopes).to(alibi_scale.dtype)
        return dqkv, None, None, dscale, None, None


def clamped(alibi_scale: Tensor) -> Tensor:
    """max(alibi_scale, 0), its gradient 0 where clamped; NaN stays, its gradient too, unlike clamp_min's."""
    return torch.where(alibi_scale < 0, 0.0, alibi_scale)


def _factor(given: _Inputs) -> Tensor:
    """[H] what distances are weighted with."""
    assert given.slopes is not None
    return given.slopes if given.alibi_scale is None else given.slopes * clamped(given.alibi_scale)


def _chunks(n: int, s: int, h: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // max(1, h * s * s * 4))
    return [slice(start, min(start + size, n)) for start in range(0, n if s * h else 0, size)]


def is_padded(lengths: Tensor, s: int) -> Tensor:
    """[n,S] bool, True behind each sequence's length."""
    return torch.arange(s, device=lengths.device) >= lengths.unsqueeze(1)


def without_padding(qkv: Tensor, lengths: Tensor, zero_padded: bool) -> Tensor:
    """qkv [n,S,3,H,Dh] with 0 for what is ignored of padded rows: in sums weighted with 0, NaN would show.

    All of a row is with zero_padded, else its key and value, where there are real ones.
    """
    padded = is_padded(lengths, qkv.shape[1])[:, :, None, None, None]
    if not zero_padded:
        key_or_value = torch.arange(3, device=qkv.device)[:, None, None] > 0
        padded = padded & (lengths > 0)[:, None, None, None, None] & key_or_value
    return qkv.masked_fill(padded, 0)


def distances(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[n,S] -> [n,1,S,S] |pos_i - pos_j|, 0 for extra tokens (position -1)."""
    positions = positions.contiguous()
    distance = (positions.unsqueeze(2) - positions.unsqueeze(1)).abs()
    real = positions >= 0
    return (distance * (real.unsqueeze(2) & real.unsqueeze(1))).to(dtype).unsqueeze(1)


def _heads(x: Tensor) -> Tensor:
    """[n,S,H,Dh] -> [n*H,S,Dh]: a view of one sequence, a copy of several."""
    return x[0].transpose(0, 1) if x.shape[0] == 1 else x.transpose(1, 2).flatten(0, 1)


def key_bias(lengths: Tensor, s: int, dtype: torch.dtype) -> Tensor:
    """[n,1,1,S]: -inf at padded keys, 0 elsewhere; all 0 where nothing but padding would be left."""
    padded = is_padded(lengths, s) & (lengths > 0).unsqueeze(1)
    bias = torch.zeros(padded.shape, dtype=dtype, device=lengths.device)
    return bias.masked_fill_(padded, float("-inf"))[:, None, None]


def _probabilities(
    given: _Inputs, settings: _Settings, chunk: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Scaled q, k, v [n*H,S,Dh]; probabilities, which are dropped [n,H,S,S]; distances [n,1,S,S]."""
    qkv = given.qkv[chunk]
    n, s, _, h, _ = qkv.shape
    wide = sum_dtype(qkv.dtype)
    if given.lengths is not None:
        qkv = without_padding(qkv, given.lengths[chunk], settings.zero_padded)
    q, k, v = (_heads(qkv[:, :, slot]) for slot in range(3))
    q = q * settings.scale
    distance = None
    if given.slopes is None or given.positions is None:
        scores = torch.bmm(q, k.transpose(1, 2)).to(wide).view(n, h, s, s)
    else:
        distance = distances(given.positions[chunk], wide)
        factor = _factor(given)
        scores = distance * -factor.to(wide).view(h, 1, 1)
        if qkv.dtype == wide:
            scores.view(n * h, s, s).baddbmm_(q, k.transpose(1, 2))
        else:
            scores += torch.bmm(q, k.transpose(1, 2)).view(n, h, s, s)
    if given.lengths is not None:
        scores += key_bias(given.lengths[chunk], s, wide)
    p = torch.softmax(scores, -1)
    dropped = None
    if settings.dropout_p:
        generator = None
        if settings.seed is None:
            generator = torch.Generator(qkv.device).manual_seed(settings.local_seed + chunk.start)
        first = chunk.start * h * s * s
        keep = keep_mask(p.shape, settings.dropout_p, qkv.device, settings.seed, first, generator)
        dropped = ~keep
    return q, k, v, p, dropped, distance


def _traced(given: _Inputs, settings: _Settings) -> Tensor:
    """The same formula as plain ops, for torch.compile to fuse and differentiate."""
    n, s, _, h, d = given.qkv.shape
    qkv = given.qkv
    if given.lengths is not None:
        qkv = without_padding(qkv, given.lengths, settings.zero_padded)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, n * h, s, d)
    wide = sum_dtype(q.dtype)
    scores = torch.bmm(q * settings.scale, k.transpose(1, 2)).view(n, h, s, s).to(wide)
    if given.slopes is not None and given.positions is not None:
        factor = _factor(given)
        scores = scores - distances(given.positions, wide) * factor.to(wide).view(h, 1, 1)
    if given.lengths is not None:
        scores = scores + key_bias(given.lengths, s, wide)
    p = torch.softmax(scores, -1)
    if settings.dropout_p:
        keep = keep_mask(p.shape, settings.dropout_p, p.device, settings.seed)
        p = p.masked_fill(~keep, 0) * (1 / (1 - settings.dropout_p))
    out = torch.bmm(p.to(v.dtype).flatten(0, 1), v).view(n, h, s, d).transpose(1, 2).reshape(n, s, h * d)
    if given.lengths is not None and settings.zero_padded:
        out = out.masked_fill(is_padded(given.lengths, s).unsqueeze(2), 0)
    return out


@without_autocast
def multimask_attention(
    qkv: Tensor,
    positions: Tensor | None = None,
    slopes: Tensor | None = None,
    alibi_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    padded_rows: str = "zero",
) -> Tensor:
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    given = _Inputs(qkv, positions, slopes, alibi_scale, lengths)
    if torch.compiler.is_compiling():
        return _traced(given, _Settings(scale, dropout_p, seed, 0, padded_rows == "zero"))
    local_seed = 0
    if dropout_p and seed is None:
        if qkv.device.type == "cpu":
            local_seed = fresh_seed()
        else:  # counter-based, so that a recorded graph draws anew at each replay
            seed = torch.randint(2**62, (), device=qkv.device)
    return _Attention.apply(*given, _Settings(scale, dropout_p, seed, local_seed, padded_rows == "zero"))
