"""Eager gelu_mlp: y = keep * gelu(x w1' + b1) / (1 - p) w2' + b2, GELU exact (erf).

Only x and the pre-activation are kept; backward recomputes GELU: the [.., hidden] activation is never stored.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2vkern import _costs
from d2vkern._nvtx import op_range

from ._autocast import without_autocast
from ._dropout import dropout_mask


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    @op_range("mlp/fwd/eager", _costs.mlp)
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        keep: Tensor | None,
        scale: float,
    ) -> Tensor:
        v1, v2 = w1.to(x.dtype), w2.to(x.dtype)
        pre = F.linear(x, v1, None if b1 is None else b1.to(x.dtype))
        act = F.gelu(pre)
        if keep is not None:
            act = act.mul_(keep).mul_(scale)
        y = F.linear(act, v2, None if b2 is None else b2.to(x.dtype))
        ctx.save_for_backward(x, pre, w1, b1, w2, b2, keep)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    @op_range("mlp/bwd/eager")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, w1, b1, w2, b2, keep = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy2, pre2 = dy.reshape(-1, dy.shape[-1]), pre.reshape(-1, pre.shape[-1])
        dx = dw1 = db1 = dw2 = db2 = None
        if needs[3]:
            act = F.gelu(pre2)
            if keep is not None:
                act = act.mul_(keep.reshape(pre2.shape)).mul_(ctx.scale)
            dw2 = (dy2.t() @ act).to(w2.dtype)
            del act
        if b2 is not None and needs[4]:
            db2 = dy2.sum(0, dtype=b2.dtype)
        if needs[0] or needs[1] or needs[2]:
            dpre = dy2 @ w2.to(dy.dtype)
            if keep is not None:
                dpre = dpre.mul_(keep.reshape(pre2.shape)).mul_(ctx.scale)
            dpre = torch.ops.aten.gelu_backward(dpre, pre2)
            if b1 is not None and needs[2]:
                db1 = dpre.sum(0, dtype=b1.dtype)
            if needs[1]:
                dw1 = (dpre.t() @ x.reshape(-1, x.shape[-1])).to(w1.dtype)
            if needs[0]:
                dx = (dpre @ w1.to(dy.dtype)).view(x.shape)
        return dx, dw1, db1, dw2, db2, None, None


@without_autocast
def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    keep = dropout_mask((*x.shape[:-1], w1.shape[0]), dropout_p, x.device, seed) if dropout_p else None
    return _GeluMLP.apply(x, w1, b1, w2, b2, keep, 1.0 / (1.0 - dropout_p))
