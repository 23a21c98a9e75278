"""Attention over many short sequences with ALiBi at arbitrary positions and a learned scale per head.

The student of data2vec 2.0 attends over the kept tokens of N = B * M masked versions. The original
materialises the ALiBi bias of all T x T pairs, repeats it M times and gathers it twice; here it comes from
the positions on the fly.
"""

import torch
from torch import Tensor

from d2vkern import _autocast
from d2vkern._backend import select
from d2vkern._checks import (
    INTEGERS,
    check_choice,
    check_dtype,
    check_range,
    check_same_device,
    check_seed,
    check_shape,
)


def multimask_attention(
    qkv: Tensor,
    *,
    positions: Tensor | None = None,
    slopes: Tensor | None = None,
    alibi_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    padded_rows: str = "zero",
    backend: str | None = None,
) -> Tensor:
    """softmax(q k' * softmax_scale - slope * max(alibi_scale, 0) * |pos_i - pos_j|) v, packed in and out.

    qkv: (N, S, 3, H, Dh), the fused projection as it comes out of its linear layer; fp32, bf16, fp16 or fp64
        (eager only). Any strides; a copy of a few sequences at a time is made.
    positions: (N, S) int32 or int64 original positions, -1 for extra tokens, whose bias is 0.
        Needed with slopes.
    slopes: (H,) ALiBi slopes; None: no bias. alibi_scale: (H,) learned factor, clamped at 0; None: 1.
    lengths: (N,) int32 or int64: keys from lengths[n] on are ignored; a length of 0 gives finite values.
    softmax_scale: None is Dh ** -0.5.
    dropout_p: in [0, 1), on the probabilities; seed: counter-based, an int or a 0-dim int64 tensor, which is
        not read on the host; None draws from torch's generator.
    padded_rows: "zero" sets the outputs of padded queries to 0; "attend" lets them attend to the real keys,
        as the original does (its convolutional decoder reads them).
    Returns (N, S, H * Dh) in qkv's dtype, under torch.autocast in its; softmax in fp32. Gradients: qkv,
    alibi_scale (exactly 0 where clamped).
    Source: data2vec 2.0, models/modalities/modules.py, AltAttention, and base.py, masked_alibi.
    Other people's kernels as backends, each with its limits (`python -m d2vkern.info`): "sdpa", "flex",
    "xformers".
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    op = "attention"
    check_dtype(op, "qkv", qkv)
    check_shape(op, "qkv", qkv, ("N", "S", 3, "H", "Dh"))
    n, s, _, h, d = qkv.shape
    if positions is not None:
        check_shape(op, "positions", positions, (n, s), like="qkv")
        check_dtype(op, "positions", positions, INTEGERS)
    if slopes is not None:
        check_shape(op, "slopes", slopes, (h,), like="qkv")
        if positions is None:
            raise ValueError(f"{op}: positions must be given with slopes, got None")
    if alibi_scale is not None:
        check_shape(op, "alibi_scale", alibi_scale, (h,), like="qkv")
        if slopes is None:
            raise ValueError(f"{op}: slopes must be given with alibi_scale, got None")
    if lengths is not None:
        check_shape(op, "lengths", lengths, (n,), like="qkv")
        check_dtype(op, "lengths", lengths, INTEGERS)
    for name, value in (("slopes", slopes), ("alibi_scale", alibi_scale)):
        if value is not None:
            check_dtype(op, name, value, (torch.float32, torch.float64))
    check_same_device(
        op, qkv=qkv, positions=positions, slopes=slopes, alibi_scale=alibi_scale, lengths=lengths
    )
    check_range(op, "head width Dh", d, minimum=1)
    check_range(op, "dropout_p", dropout_p, minimum=0.0, below=1.0)
    seed = None if seed is None else check_seed(op, seed)
    check_choice(op, "padded_rows", padded_rows, ("zero", "attend"))
    (qkv,) = _autocast.for_product(qkv)
    implementation = select(
        "attention",
        backend,
        qkv,
        slopes=slopes,
        alibi_scale=alibi_scale,
        lengths=lengths,
        dropout_p=dropout_p,
        seed=seed,
    )
    return implementation.multimask_attention(
        qkv, positions, slopes, alibi_scale, lengths, softmax_scale, dropout_p, seed, padded_rows
    )
