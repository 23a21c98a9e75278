"""Eager gelu_mlp: y = keep * gelu(x w1' + b1) / (1 - p) w2' + b2, and linear: x w' + b.

Of gelu_mlp only x and the pre-activation are kept; backward recomputes GELU: the [.., hidden] activation is
never stored. Weights are cast to x's dtype at each use, and sums for the biases are taken in theirs.
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
from ._common import rows_of
from ._dropout import dropout_mask

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [.., D], w [O, D], b [O] or None -> [.., O], all of one dtype"""
Product = Callable[[Tensor, Tensor], Tensor]
"""[m, k], [k, n] -> [m, n]"""


def with_products(backend: str, affine: Linear, product: Product) -> tuple[Callable[..., Tensor], Linear]:
    """gelu_mlp and linear whose matrix products are these; `backend` names their ranges."""

    class _GeluMLP(torch.autograd.Function):
        @staticmethod
        @op_range(f"mlp/fwd/{backend}", _costs.mlp)
        def forward(
            ctx: Any,
            x: Tensor,
            w1: Tensor,
            b1: Tensor | None,
            w2: Tensor,
            b2: Tensor | None,
            keep: Tensor | None,
            scale: float,
            approximate: str,
        ) -> Tensor:
            pre = affine(x, w1.to(x.dtype), _cast(b1, x))
            act = F.gelu(pre, approximate=approximate)
            if keep is not None:
                act = act.mul_(keep).mul_(scale)
            y = affine(act, w2.to(x.dtype), _cast(b2, x))
            ctx.save_for_backward(x, pre, w1, b1, w2, b2, keep)
            ctx.scale, ctx.approximate = scale, approximate
            return y

        @staticmethod
        @first_order("gelu_mlp")
        @without_autocast
        @op_range(f"mlp/bwd/{backend}")
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, pre, w1, b1, w2, b2, keep = ctx.saved_tensors
            needs = ctx.needs_input_grad
            dy2, pre2 = rows_of(dy), rows_of(pre)
            dx = dw1 = db1 = dw2 = db2 = None
            if needs[3]:
                act = F.gelu(pre2, approximate=ctx.approximate)
                if keep is not None:
                    act = act.mul_(keep.reshape(pre2.shape)).mul_(ctx.scale)
                dw2 = product(dy2.t(), act).to(w2.dtype)
                del act
            if b2 is not None and needs[4]:
                db2 = dy2.sum(0, dtype=b2.dtype)
            if needs[0] or needs[1] or needs[2]:
                dpre = product(dy2, w2.to(dy.dtype))
                if keep is not None:
                    dpre = dpre.mul_(keep.reshape(pre2.shape)).mul_(ctx.scale)
                dpre = torch.ops.aten.gelu_backward(dpre, pre2, approximate=ctx.approximate)
                if b1 is not None and needs[2]:
                    db1 = dpre.sum(0, dtype=b1.dtype)
                if needs[1]:
                    dw1 = product(dpre.t(), rows_of(x)).to(w1.dtype)
                if needs[0]:
                    dx = product(dpre, w1.to(dy.dtype)).view(x.shape)
            return dx, dw1, db1, dw2, db2, None, None, None

    class _Linear(torch.autograd.Function):
        @staticmethod
        @op_range(f"linear/fwd/{backend}", _costs.linear)
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            ctx.save_for_backward(x, w, b)
            return affine(x, w.to(x.dtype), _cast(b, x))

        @staticmethod
        @first_order("linear")
        @without_autocast
        @op_range(f"linear/bwd/{backend}")
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            x, w, b = ctx.saved_tensors
            dy2 = rows_of(dy)
            dx = dw = db = None
            if ctx.needs_input_grad[0]:
                dx = product(dy2, w.to(dy.dtype)).view(x.shape)
            if ctx.needs_input_grad[1]:
                dw = product(dy2.t(), rows_of(x)).to(w.dtype)
            if b is not None and ctx.needs_input_grad[2]:
                db = dy2.sum(0, dtype=b.dtype)
            return dx, dw, db

    @without_autocast
    def gelu_mlp(
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        dropout_p: float = 0.0,
        seed: int | Tensor | None = None,
        approximate: str = "none",
    ) -> Tensor:
        keep = dropout_mask((*x.shape[:-1], w1.shape[0]), dropout_p, x.device, seed) if dropout_p else None
        return _GeluMLP.apply(x, w1, b1, w2, b2, keep, 1.0 / (1.0 - dropout_p), approximate)

    @without_autocast
    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _Linear.apply(x, w, b)

    return gelu_mlp, linear


def _cast(b: Tensor | None, x: Tensor) -> Tensor | None:
    return None if b is None else b.to(x.dtype)


gelu_mlp, linear = with_products("eager", F.linear, torch.mm)
