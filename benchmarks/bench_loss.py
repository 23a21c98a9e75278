"""The masked regression loss with its gradient, against repeating the targets and indexing with the mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Shapes, Size, normal, shapes


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """Predictions at the masked places alone (what our decoder makes) and at all places."""
    s = shapes(preset, size)
    return [_case(s, "masked places", s.masked, dtype), _case(s, "all places", s.tokens, dtype)]


def _case(s: Shapes, name: str, places: int, dtype: torch.dtype) -> Case:
    d, beta = s.cfg.dim, s.cfg.loss_beta
    scale = d**-0.5 if s.cfg.loss_scale is None else s.cfg.loss_scale

    def make(device: torch.device) -> Inputs:
        return {
            "plan": s.random_plan(device),
            "pred": normal(device, s.rows, places, d, dtype=dtype),
            "target": normal(device, s.batch, s.tokens, d),
        }

    def call(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
        return d2vkern.masked_regression_loss(**inputs, beta=beta, scale=scale, backend=backend)._asdict()

    def plain(inputs: Inputs) -> dict[str, Tensor]:
        plan, pred, target = inputs["plan"], inputs["pred"], inputs["target"]
        wide = torch.promote_types(pred.dtype, torch.float32)
        y = target.repeat_interleave(plan.clones, 0)[plan.mask].to(wide)
        x = (pred[plan.mask] if pred.shape[1] == s.tokens else pred.flatten(0, 1)).to(wide)
        if beta == 0:
            error = F.mse_loss(x, y, reduction="none")
        else:
            error = F.smooth_l1_loss(x, y, reduction="none", beta=beta)
        with torch.no_grad():
            pred_var, target_var = (torch.sqrt(z.var(0) + 1e-6).mean() for z in (x, y))
        return {
            "loss": error.sum() * scale,
            "count": plan.mask.sum(),
            "pred_var": pred_var,
            "target_var": target_var,
        }

    compared = s.rows * s.masked * d * dtype.itemsize
    gradient = s.rows * places * d * dtype.itemsize
    return Case(
        op="masked_regression_loss",
        name=name,
        preset=s.preset,
        shape=f"N{s.rows} T{s.tokens} masked {s.masked} D{d}",
        dtype=dtype,
        make=make,
        call=call,
        plain=plain,
        leaves=("pred",),
        # the gradient is made in the forward; scaling it by the incoming 0-dim gradient can cost nothing
        forward=Cost(compared + gradient + 4 * s.batch * s.tokens * d + 4 * s.rows * s.masked, 0),
    )
