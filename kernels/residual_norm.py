"""Triton residual_norm: z = x + s k g (update + update_bias), y = n weight + bias, n = (z - mean) rstd.

    s = 1 / ((1 - p) (1 - p_path)); k = 0 for dropped elements and for all rows of a dropped sample, else 1
    dz = rstd (dy w - mean(dy w) - n mean(dy w n)) (+ dsum);  dx = dz;  dupdate = s k g dz
    dweight, dbias, dupdate_bias = sums over the rows of dy n, dy and dupdate
    dgamma = sum over the rows of s k (update + update_bias) dz

g is gamma, or 1. With prenorm z is an output too, and dsum its gradient. The dtype is x's, in which z, y and
dx are; update and its gradient may be narrower.

Layout: x, update and dy are [samples, group, D], each with two strides of its own and contiguous along D;
anything else is copied once, and so is a dsum that is not contiguous. z, y and the gradients are.

fp32 between loads and stores, and parameters as they are: two roundings fewer than eager, which casts them
and rounds update + update_bias. z is rounded where eager rounds it, before the statistics, so that forward
and backward speak of the same z. The variance is that of the centred values, so a large mean costs no digits.

Forward (residual_norm_fwd.py): a program takes BLOCK_R whole rows, in chunks of columns that stay in
registers (_rows.py). Dropout's bits are made in place (_dropout.py).

Backward (residual_norm_bwd.py): P = min(256, rows / 40) programs share the rows evenly and keep the column
sums of theirs in registers; a second kernel adds the P partial rows (_column_sums.py). P follows from the
shape, not from the number of SMs, so that the bits of the vectors' gradients do not depend on the GPU (unless
its entry in tuned.json says otherwise); of four warps each, 256 programs are two to each of 132 SMs. So few
would not cover the latency of memory: tiles are fetched by asynchronous copies, STAGES - 1 ahead.

Bytes, in passes over [rows, D] (the floor: _costs.residual_norm):
    forward    x, update read; y and, for backward or prenorm, z written: 4, the floor; 3 without
    backward   dy, z read; dx written: 3, the floor; one more each for dupdate (with dropout, gamma or a dtype
               of its own), dsum, and the update that gamma's gradient needs
    partials   2 P D fp32 written and read: 6.8% more at 10,240 x 768 bf16 (image_base), 1.7% at 40,960 rows
    mean, rstd 8 bytes a row each way

Keeping z costs in writes what making it again from x and update would cost in reads: 7 passes (8 with
dropout) either way. But one tensor is held instead of two, and the heavier kernel reads one less.
"""

from typing import Any

import torch
from torch import Tensor

from d2vkern._derivatives import first_order
from d2vkern._library import define, needed
from d2vkern.kernels._dropout import draw_seed
from d2vkern.kernels.residual_norm_bwd import backward, backward_outputs
from d2vkern.kernels.residual_norm_fwd import forward, forward_outputs

_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? update_bias, Tensor? gamma, Tensor? seed"
_fwd_op = define(
    f"residual_norm_fwd(Tensor x, Tensor update, {_PARAMETERS}, bool prenorm, float eps, float dropout_p, "
    "float drop_path_p, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    forward,
    forward_outputs,
)
_bwd_op = define(
    "residual_norm_bwd(Tensor dy, Tensor? dsum, Tensor? update, Tensor z, Tensor mean, Tensor rstd, "
    f"{_PARAMETERS}, ScalarType update_dtype, float dropout_p, float drop_path_p, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    backward_outputs,
)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        update_bias: Tensor | None,
        gamma: Tensor | None,
        seed: Tensor | None,
        prenorm: bool,
        eps: float,
        dropout_p: float,
        drop_path_p: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, z, mean, rstd = _fwd_op(
            x, update, weight, bias, update_bias, gamma, seed, prenorm, eps, dropout_p, drop_path_p, True
        )
        kept_update = None if gamma is None else update
        ctx.save_for_backward(kept_update, z, mean, rstd, weight, bias, update_bias, gamma, seed)
        ctx.settings = update.dtype, dropout_p, drop_path_p
        return (z, y) if prenorm else y

    @staticmethod
    @first_order("residual_norm")
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        *dsum, dy = douts
        update, z, *_, seed = saved = ctx.saved_tensors
        wanted = needs = list(ctx.needs_input_grad[:6])
        shared = seed is None and update is None and ctx.settings[0] == z.dtype
        if shared:  # nothing is dropped or scaled: x and update have one gradient
            needs = [wanted[0] or wanted[1], False, *wanted[2:]]
        dx, dupdate, *vectors = _bwd_op(dy, dsum[0] if dsum else None, *saved, *ctx.settings, needs)
        gradients = (dx, dx if shared else dupdate, *vectors)
        return *needed(gradients, wanted), *[None] * 5


def residual_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    update_bias: Tensor | None = None,
    seed: int | Tensor | None = None,
    prenorm: bool = False,
    gamma: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    source = draw_seed(seed, x.device) if dropout_p or drop_path_p else None
    tensors = (x, update, weight, bias, update_bias, gamma, source)
    settings = (prenorm, eps, dropout_p, drop_path_p)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _ResidualNorm.apply(*tensors, *settings)
    y, z, *_ = _fwd_op(*tensors, *settings, False)
    return (z, y) if prenorm else y
