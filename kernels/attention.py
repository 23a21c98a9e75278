"""Triton multimask_attention: softmax(q k' scale - w |pos_i - pos_j|) v; no bias tensor, no permute, no copy.

    p_ij = 2^(s_ij - lse_i), s_ij as in _attention.py;  o_i = 1/(1-p) sum_j k_ij p_ij v_j,  k_ij = 0 or 1
    dp_ij = k_ij do_i v_j / (1-p);  delta_i = sum_j p_ij dp_ij = do_i o_i;  ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i;  dv_j = 1/(1-p) sum_i k_ij p_ij do_i
    dalibi_scale_h = -slope_h sum_ij ds_ij |pos_i - pos_j| where alibi_scale_h >= 0, else 0

Layout: qkv [N, S, 3, H, Dh] with any strides that are contiguous along Dh, out [N, S, H * Dh], dqkv like qkv
and contiguous. dout and positions [N, S] may have any strides that are contiguous along the last dimension;
what is not is copied once. A head's rows are Dh elements apart by a stride, which is a tile's row each: whole
cache lines at Dh = 64 in 16 bits. Dh up to 128; tiles are the next power of two wide, at least 16, and what
lies beyond Dh is never loaded. At Dh = 80 (image_huge14) 3/8 of the products are with zeros.

S <= 64 in 16 bits (attention_fwd_kernel_short, attention_bwd_kernel_short): a program owns one head of one
sequence, its whole score matrix in registers; the backward makes the probabilities anew, so that only qkv is
kept. Tiles of 16 and 32 tokens run on mma, of 64 on wgmma, which needs 64 rows and four warps. In fp32, whose
products take their operands from registers, a whole sequence does not fit.

Otherwise a program of attention_fwd_kernel owns BLOCK_M queries of a head and walks over its keys, with the
running maximum and sum of the softmax; it leaves lse [N, H, S]. Backward has two kernels, so that every sum
has one owner: attention_bwd_kernel_queries owns BLOCK_M queries (dq; and delta, which costs it a read of o
but no pass of its own), attention_bwd_kernel_keys BLOCK_N keys (dk, dv). No atomics: the same inputs give the
same bits. alibi_scale's gradient leaves each program as a partial sum, which a last kernel adds in order
(_column_sums.py). Which tiles: _attention_tiles.py.

Scores, probabilities and sums are fp32; operands of products have the dtype of qkv, so p and ds are rounded
to it, as eager does; scores and dp stay in fp32 where eager rounds them. fp32 products are exact ones
("ieee"), never TF32. Padded keys are not read at all and padded queries only where they attend: NaN in
padding harms nobody.

Dropout: element ((n H + h) S + i) S + j of [N, H, S, S] (_dropout.py); nothing is stored. Its generator costs
about 10 instructions a probability when S is a multiple of 8 and 20 when not, in each kernel.

Bytes, in tensors of N S H Dh elements (the floor: _costs.attention):
    forward         q, k, v read; o written: 4, the floor. lse: 4 bytes a row, 3% of one tensor at Dh = 64
    backward short  q, k, v, do read; dq, dk, dv written: 7; the floor counts o too: 8
    backward long   both kernels read q, k, v and do, one of them o; dq, dk, dv written: 12
FLOPs of products: 4 N H S^2 Dh forward and 8 backward at the floor; making the scores anew costs backward 2
(short), and 6 (long, scores and dp in both kernels). Padding to whole tiles comes on top: 64 for 41 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2vkern._derivatives import first_order
from d2vkern._library import define
from d2vkern.kernels._attention import is_short
from d2vkern.kernels._dropout import draw_seed
from d2vkern.kernels.attention_bwd import backward, backward_outputs
from d2vkern.kernels.attention_fwd import forward, forward_outputs

_INPUTS = (
    "Tensor? positions, Tensor? slopes, Tensor? alibi_scale, Tensor? lengths, Tensor? seed, float? scale, "
    "float dropout_p, bool zero_padded"
)
_fwd_op = define(
    f"attention_fwd(Tensor qkv, {_INPUTS}, bool save) -> (Tensor, Tensor)", forward, forward_outputs
)
_bwd_op = define(
    f"attention_bwd(Tensor dout, Tensor qkv, Tensor? out, Tensor lse, {_INPUTS}, bool[] needs) "
    "-> (Tensor, Tensor)",
    backward,
    backward_outputs,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        alibi_scale: Tensor | None,
        positions: Tensor | None,
        slopes: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        scale: float | None,
        dropout_p: float,
        zero_padded: bool,
    ) -> Tensor:
        settings = (scale, dropout_p, zero_padded)
        out, lse = _fwd_op(qkv, positions, slopes, alibi_scale, lengths, seed, *settings, True)
        # A short sequence's backward starts from qkv alone.
        kept = None if is_short(qkv) else out
        ctx.save_for_backward(qkv, kept, lse, positions, slopes, alibi_scale, lengths, seed)
        ctx.settings = settings
        return out

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:2])
        dqkv, dscale = _bwd_op(dout, *ctx.saved_tensors, *ctx.settings, needs)
        return (dqkv if needs[0] else None, dscale if needs[1] else None, *(None,) * 7)


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
    source = draw_seed(seed, qkv.device) if dropout_p else None
    zero_padded = padded_rows == "zero"
    if torch.is_grad_enabled() and (
        qkv.requires_grad or (alibi_scale is not None and alibi_scale.requires_grad)
    ):
        return _Attention.apply(
            qkv, alibi_scale, positions, slopes, lengths, source, softmax_scale, dropout_p, zero_padded
        )
    tensors = (qkv, positions, slopes, alibi_scale, lengths, source)
    return _fwd_op(*tensors, softmax_scale, dropout_p, zero_padded, False)[0]
