"""multimask_attention on xformers.ops.memory_efficient_attention (xformers 0.0.28 or newer, CUDA).

q, k, v [N,S,H,Dh] are views of the packed projection. With slopes the bias [N,H,S,S] is a slice of one whose
rows are padded to a multiple of 8, as its kernels want; autograd carries its gradient to alibi_scale. With
lengths alone real tokens are packed into one long sequence under a BlockDiagonalMask, whose sizes the host
reads. xformers calls the operator nondeterministic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from xformers.ops import memory_efficient_attention
from xformers.ops.fmha.attn_bias import BlockDiagonalMask

from d2vkern import _costs
from d2vkern._nvtx import op_range

from ._bias import dense_bias, key_mask, qkv_of, real_keys, zero_padded_rows

ALIGNMENT = 8
"""values; strides of a bias must be multiples of 16 bytes"""


def _cost(qkv: Tensor, positions: Tensor | None = None, *_: Any, **__: Any) -> _costs.Cost:
    return _costs.attention(qkv, positions, grad=())


@op_range("attention/fwd/xformers", _cost)
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
    n, s, _, h, d = qkv.shape
    if qkv.numel() == 0:
        return qkv.reshape(n, s, 3 * h * d)[:, :, : h * d]
    if slopes is not None:
        qkv = qkv_of(qkv, lengths, padded_rows)
    if qkv.stride(4) != 1:
        qkv = qkv.contiguous()
    q, k, v = qkv.unbind(2)
    if slopes is None and lengths is not None:
        out = _block_diagonal(q, k, v, lengths, softmax_scale, dropout_p, padded_rows)
    else:
        bias = None
        if slopes is not None and positions is not None:
            bias = dense_bias(positions, slopes, alibi_scale, lengths, q.dtype)
            bias = F.pad(bias, (0, -s % ALIGNMENT))[..., :s]
        out = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p, scale=softmax_scale)
    return zero_padded_rows(out.flatten(2), lengths, padded_rows)


def _block_diagonal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float | None,
    dropout_p: float,
    padded_rows: str,
) -> Tensor:
    """[N,S,H,Dh]; queries behind a length are left out (as zeros) unless `padded_rows` is "attend"."""
    n, s = q.shape[:2]
    used = key_mask(lengths, s).flatten()
    sizes = real_keys(lengths, s).tolist()
    queries = [s] * n if padded_rows == "attend" else sizes
    rows = torch.arange(n * s, device=q.device) if padded_rows == "attend" else used.nonzero().squeeze(1)
    keys = used.nonzero().squeeze(1)
    out = memory_efficient_attention(
        q.flatten(0, 1)[rows].unsqueeze(0),
        k.flatten(0, 1)[keys].unsqueeze(0),
        v.flatten(0, 1)[keys].unsqueeze(0),
        attn_bias=BlockDiagonalMask.from_seqlens(queries, sizes, device=q.device),
        p=dropout_p,
        scale=scale,
    )
    whole = q.new_zeros(n * s, *q.shape[2:])
    return whole.index_copy(0, rows, out.squeeze(0)).view(q.shape)
