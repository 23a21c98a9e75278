"""The residual connection and norm of a transformer block, post-norm or pre-norm, in one pass each way."""

from typing import Literal, overload

import torch
from torch import Tensor

from d2vkern import _autocast
from d2vkern._backend import select
from d2vkern._checks import (
    check_dtype,
    check_range,
    check_rows,
    check_same_device,
    check_same_dtype,
    check_seed,
    check_shape,
)


@overload
def residual_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    prenorm: Literal[False] = False,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def residual_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    prenorm: Literal[True],
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def residual_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    prenorm: bool,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def residual_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    prenorm: bool = False,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    update_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = LayerNorm(z) over the last dimension, z = x + path * gamma * dropout(update + update_bias).

    x: (..., D) fp32, bf16, fp16 or fp64 (eager only). update: like x; beside fp32 x it may be bf16 or fp16.
    weight, bias: (D,) affine of the norm, x's dtype or fp32; None leaves it out.
    prenorm: return (z, y): the residual stream goes on from the sum, the next layer reads its norm.
    dropout_p: probability in [0, 1) that an element of the update is dropped; the rest is scaled by
        1 / (1 - p).
    drop_path_p: probability in [0, 1) that a row of the first dimension loses its whole update,
        scaled likewise; x must have a dimension before D then.
    update_bias: (D,) bias of the projection that made `update`, x's dtype or fp32, if left to this op.
    gamma: (D,) scale of the update, x's dtype or fp32: LayerScale of CaiT, section 2.1; None: 1.
    seed: counter-based dropout, the same in every backend; None draws from torch's generator.
    Returns (..., D) in x's dtype; statistics in fp32, biased variance. Under torch.autocast fp32 as torch's
    layer_norm, on a CPU the wider dtype of x and update. Gradients: x, update, weight, bias, update_bias,
    gamma, from z and y.
    Source: data2vec 2.0, models/modalities/modules.py, AltBlock with layer_norm_first=False; with prenorm
    timm's models/vision_transformer.py, Block, where z is the next residual and y the input of norm's layer.
    Raises ValueError or TypeError for shapes, dtypes, devices or probabilities that do not fit.
    """
    op = "residual_norm"
    check_rows(op, "x", x)
    check_dtype(op, "x", x)
    check_shape(op, "update", update, tuple(x.shape), like="x")
    vectors = {"weight": weight, "bias": bias, "update_bias": update_bias, "gamma": gamma}
    for name, value in vectors.items():
        if value is not None:
            check_shape(op, name, value, (x.shape[-1],), like="x")
    x, update, *found = _autocast.for_norm(x, update, *vectors.values())
    weight, bias, update_bias, gamma = found
    if x.dtype == torch.float32:
        check_dtype(op, "update", update, (torch.float32, torch.bfloat16, torch.float16))
    else:
        check_same_dtype(op, x=x, update=update)
    for name, value in zip(vectors, found, strict=True):
        if value is not None:
            check_dtype(op, name, value, (x.dtype, torch.float32))
    check_same_device(op, x=x, update=update, **vectors)
    check_range(op, "eps", eps, minimum=0.0)
    check_range(op, "dropout_p", dropout_p, minimum=0.0, below=1.0)
    check_range(op, "drop_path_p", drop_path_p, minimum=0.0, below=1.0)
    seed = None if seed is None else check_seed(op, seed)
    if drop_path_p and x.dim() < 2:
        raise ValueError(f"{op}: x must have a dimension before D with drop_path_p, got {tuple(x.shape)}")
    implementation = select("residual_norm", backend, x, update)
    return implementation.residual_norm(
        x, update, weight, bias, eps, dropout_p, drop_path_p, update_bias, seed, prenorm, gamma
    )
