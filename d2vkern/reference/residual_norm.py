"""Eager residual_norm: z = x + path * gamma * keep * (update + update_bias) / (1 - p), y = LayerNorm(z).

Saved for backward: z (LayerNorm's own input), mean and rstd per row in fp32, and one byte per element when
there is dropout. The gradients of x and update are the same tensor when nothing is dropped and they have one
dtype. With prenorm z is an output too, and its gradient is added to the norm's. gamma's gradient needs the
update, which is kept for it.
"""

from typing import Any

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._nvtx import op_range

from ._common import rows_of
from ._dropout import dropout_mask
from ._layer_norm import layer_norm, layer_norm_backward


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    @op_range("residual_norm/fwd/eager", _costs.residual_norm)
    def forward(
        ctx: Any,
        x: Tensor,
        update: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        update_bias: Tensor | None,
        gamma: Tensor | None,
        keep: Tensor | None,
        prenorm: bool,
        scale: float,
        eps: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        added = _biased(update, update_bias, x.dtype)
        if keep is not None:
            added = added * keep
        if gamma is not None:
            added = added * gamma.to(x.dtype)
        z = torch.add(x, added, alpha=scale)
        y, mean, rstd = layer_norm(z, weight, bias, eps)
        kept_update = None if gamma is None else update
        ctx.save_for_backward(z, mean, rstd, weight, bias, update_bias, gamma, keep, kept_update)
        ctx.scale, ctx.update_dtype = scale, update.dtype
        return (z, y) if prenorm else y

    @staticmethod
    @first_order("residual_norm")
    @op_range("residual_norm/bwd/eager")
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        *dsum, dy = douts
        z, mean, rstd, weight, bias, update_bias, gamma, keep, update = ctx.saved_tensors
        dz, dw, db = layer_norm_backward(dy, z, mean, rstd, weight, bias)
        for gradient in dsum:
            dz = dz.add_(gradient)
        du = dz if keep is None and ctx.scale == 1.0 else dz * ctx.scale
        if keep is not None:
            du = du.mul_(keep)
        dub = dgamma = None
        if gamma is not None:
            dgamma = rows_of(du * _biased(update, update_bias, z.dtype)).sum(0, dtype=gamma.dtype)
            du = du * gamma.to(z.dtype)
        if update_bias is not None:
            dub = rows_of(du).sum(0, dtype=update_bias.dtype)
        return (
            dz,
            du.to(ctx.update_dtype),
            None if dw is None or weight is None else dw.to(weight.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
            dub,
            dgamma,
            None,
            None,
            None,
            None,
        )


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
    keep = dropout_mask(update.shape, dropout_p, x.device, seed) if dropout_p else None
    if drop_path_p:
        rows = (x.shape[0], *([1] * (x.dim() - 1)))
        path = dropout_mask(rows, drop_path_p, x.device, None if seed is None else seed ^ 1)
        keep = path if keep is None else keep & path
    scale = 1.0 / ((1.0 - dropout_p) * (1.0 - drop_path_p))
    return _ResidualNorm.apply(x, update, weight, bias, update_bias, gamma, keep, prenorm, scale, eps)


def _biased(update: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return update if bias is None else update + bias.to(dtype)
