"""multimask_attention on torch.nn.functional.scaled_dot_product_attention.

q, k, v are views of the packed projection. With slopes the bias [N,H,S,S] is built in fp32; autograd carries
its gradient to alibi_scale. CPU kernels take it as it is, on a GPU it is cast to q's dtype, which is what its
kernels read. With lengths alone the mask is [N,1,1,S] bool. On a GPU a biased call is kept off cuDNN, which
misread biases and whose gradient of them is for one sequence only; PyTorch calls the backward of its fused
kernels nondeterministic. The CPU's fused kernel gives 0 for a query of NaN that meets fewer keys than a
vector holds (findings/sdpa_cpu_nan.sh): so few go without it. Dropout is SDPA's own; a seed arrives under
D2VKERN_CHECK=1 only and is not used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2vkern import _costs
from d2vkern._nvtx import op_range

from ._bias import dense_bias, key_mask, qkv_of, zero_padded_rows

WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""what takes a dense bias on a GPU, and its gradient"""
FEW_KEYS = 16
"""fp32 values of the widest vectors of a CPU: with fewer keys its fused kernel drops NaN"""


def _cost(qkv: Tensor, positions: Tensor | None = None, *_: Any, **__: Any) -> _costs.Cost:
    return _costs.attention(qkv, positions, grad=())


@op_range("attention/fwd/sdpa", _cost)
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
        out = qkv.reshape(n, s, 3 * h * d)[:, :, : h * d]
        return out if alibi_scale is None else out * alibi_scale.sum()  # a gradient of 0
    q, k, v = qkv_of(qkv, lengths, padded_rows).permute(2, 0, 3, 1, 4)  # [N,H,S,Dh] each
    mask = None
    if slopes is not None and positions is not None:
        dtype = q.dtype if qkv.is_cuda else torch.float32
        mask = dense_bias(positions, slopes, alibi_scale, lengths, dtype)
    elif lengths is not None:
        mask = key_mask(lengths, s)
    kernels = None
    if slopes is not None and qkv.is_cuda:
        kernels = WITH_BIAS
    elif s < FEW_KEYS and qkv.device.type == "cpu":
        kernels = [SDPBackend.MATH]
    if kernels is not None:
        with sdpa_kernel(kernels):
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=softmax_scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=softmax_scale)
    return zero_padded_rows(out.transpose(1, 2).flatten(2), lengths, padded_rows)
