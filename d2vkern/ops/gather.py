"""Gather the kept tokens of every masked version, and scatter them back for the decoder.

data2vec 2.0 encodes M masked versions of each sample. Repeating the sample M times and then picking the kept
tokens moves M * T / K times what is needed; these ops read the unrepeated tokens and write the kept ones.
"""

from torch import Tensor

from d2vkern import _autocast
from d2vkern._backend import select
from d2vkern._checks import (
    check_dtype,
    check_range,
    check_same_device,
    check_same_dtype,
    check_seed,
    check_shape,
)
from d2vkern.ops.masks import MaskPlan


def gather_tokens(
    x: Tensor,
    plan: MaskPlan,
    extra: Tensor | None = None,
    positions: Tensor | None = None,
    per_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Kept tokens of each masked version, extra tokens in front.

    out[n, E + k] = x[b, t] + positions[t] + per_mask[n, t] with n = b * M + m and t = plan.ids_keep[n, k];
    out[n, :E] = extra, without position.
    x: [B, T, D] fp32, bf16, fp16 or fp64 (eager only), not repeated. A layout whose [B, T] cannot be viewed
        as one dimension is copied once.
    plan: MaskPlan of B samples and T tokens.
    extra: [E, D] tokens put in front of every row (CLS).
    positions: [T, D], the same for all samples.
    per_mask: [N, T, D], what depends on the masked version (the speech positional encoder).
        All in x's dtype (under torch.autocast the widest of theirs) and on its device.
    Returns [N, E + K, D], 0 at the padding of rows that keep less than K. The gradient of x sums over a
    sample's rows in fixed order, in fp32.
    Raises ValueError or TypeError when shapes, dtypes or devices do not fit.
    """
    op = "gather_tokens"
    check_shape(op, "x", x, (plan.samples, plan.tokens, "D"), like="plan")
    check_dtype(op, "x", x)
    width = x.shape[2]
    if extra is not None:
        check_shape(op, "extra", extra, ("E", width), like="x")
    if positions is not None:
        check_shape(op, "positions", positions, (plan.tokens, width), like="x")
    if per_mask is not None:
        check_shape(op, "per_mask", per_mask, (*plan.mask.shape, width), like="plan and x")
    x, extra, positions, per_mask = _autocast.for_gather(x, extra, positions, per_mask)
    check_same_dtype(op, x=x, extra=extra, positions=positions, per_mask=per_mask)
    check_same_device(op, x=x, plan=plan.mask, extra=extra, positions=positions, per_mask=per_mask)
    return select("gather", backend, x).gather_tokens(x, plan, extra, positions, per_mask)


def scatter_tokens(
    x: Tensor,
    plan: MaskPlan,
    noise_std: float = 0.0,
    seed: int | Tensor = 0,
    *,
    mask_token: Tensor | None = None,
    keep_extra: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Decoder input: kept tokens at their places; noise (data2vec 2.0) or a token (MAE) at the masked ones.

    x: [N, E + K, D]; the E extra tokens in front (as many as exceed plan.kept) are dropped.
    noise_std: deviation of the noise, >= 0; with 0 the masked places are exactly 0 and nothing is drawn.
    seed: 64-bit int, or a 0-dim int64 tensor (read on the device, so that a replayed graph can be given
        another). The noise of element [n, t, d] depends on (seed, n, t, d) only; it is drawn in fp32 and
        cast to x's dtype.
    mask_token: [D], or as MAE holds it [1, 1, D]: stands at the masked places instead of noise. In x's dtype
        (under torch.autocast the widest of both, for x too).
    keep_extra: the extra tokens stay in front.
    Returns [N, T, D], with keep_extra [N, E + T, D], in x's dtype. The gradient of x is a gather; it is 0 for
    extra tokens that are dropped and for the padding of rows. That of mask_token sums over all masked places
    in fixed order, in fp32 or wider.
    Source: data2vec 2.0, models/modalities/base.py, `add_mask_tokens`; MAE, models_mae.py, `forward_decoder`.
    Raises ValueError or TypeError when shapes, dtypes or devices do not fit, and for noise beside mask_token.
    """
    op = "scatter_tokens"
    check_shape(op, "x", x, (plan.mask.shape[0], "S", "D"), like="plan")
    check_range(op, "x tokens S", x.shape[1], minimum=plan.kept)
    check_dtype(op, "x", x)
    if mask_token is not None:
        width = x.shape[2]
        if mask_token.shape != (1, 1, width):
            check_shape(op, "mask_token", mask_token, (width,), like="x")
        x, mask_token = _autocast.for_gather(x, mask_token.reshape(width))
        check_same_dtype(op, x=x, mask_token=mask_token)
        if noise_std > 0.0:
            raise ValueError(f"{op}: noise_std must be 0 with mask_token, got {noise_std}")
    check_same_device(op, x=x, plan=plan.mask, mask_token=mask_token)
    check_range(op, "noise_std", noise_std, minimum=0.0)
    seed = check_seed(op, seed)
    return select("gather", backend, x).scatter_tokens(x, plan, noise_std, seed, mask_token, keep_extra)
