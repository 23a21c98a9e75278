"""Which calls the backends made by others refuse, and why.

A function per backend: the call's first tensor, then its other arguments by name -> reasons (none: it takes
the call). Dynamo traces them: they look at dtypes, devices, sizes, whether a gradient is wanted and what is
None, never at values. They stand apart from the backends' modules: nobody imports those for the asking.
"""

from typing import Any

import torch
from torch import Tensor

LIMITS = {
    "sdpa": "builds the bias [N,H,S,S]; unseeded dropout only; on a GPU its backward may differ in last bits",
    "flex": "no dropout, no gradient of alibi_scale, on a CPU no gradient at all",
    "xformers": "builds the bias [N,H,S,S]; unseeded dropout only; backward may differ in last bits",
    "onednn": "fp32 on a CPU only",
}
"""what holds for every machine, in a line"""


def sdpa(
    qkv: Tensor,
    *,
    alibi_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    **_: Any,
) -> list[str]:
    """torch.nn.functional.scaled_dot_product_attention."""
    reasons = _common(qkv, dropout_p, seed)
    if qkv.is_cuda and _wants_gradient(alibi_scale) and not _wants_gradient(qkv):
        reasons.append("it crashes where the bias alone wants a gradient (PyTorch issue 188302)")
    return reasons


def flex(qkv: Tensor, *, alibi_scale: Tensor | None = None, dropout_p: float = 0.0, **_: Any) -> list[str]:
    """torch.nn.attention.flex_attention."""
    reasons = _common(qkv, 0.0, None)
    if dropout_p:
        reasons.append("it has no dropout")
    if _wants_gradient(alibi_scale):
        reasons.append(
            "it sums the gradient of alibi_scale by atomics, in no fixed order (PyTorch pull request 137452)"
        )
    if qkv.device.type == "cpu" and _wants_gradient(qkv):
        reasons.append("it has no backward on a CPU")
    if qkv.is_cuda and qkv.shape[4] < 16:
        reasons.append(f"it needs heads at least 16 wide, got {qkv.shape[4]}")
    return reasons


def xformers(
    qkv: Tensor,
    *,
    slopes: Tensor | None = None,
    alibi_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    **_: Any,
) -> list[str]:
    """xformers.ops.memory_efficient_attention."""
    reasons = _common(qkv, dropout_p, seed)
    if not qkv.is_cuda:
        reasons.append("its kernels need CUDA tensors")
    if qkv.shape[4] % 8:
        reasons.append(f"it needs a head width that is a multiple of 8, got {qkv.shape[4]}")
    if _wants_gradient(alibi_scale) and not _wants_gradient(qkv):
        reasons.append("it gives the bias no gradient unless qkv wants one too")
    if lengths is not None and slopes is None and _host_must_not_read(qkv):
        reasons.append("its block-diagonal mask reads lengths on the host, which a recorded graph cannot")
    return reasons


def onednn(x: Tensor, **_: Any) -> list[str]:
    """oneDNN's matrix products."""
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"it runs on CPU tensors, not on {x.device.type}")
    if x.dtype == torch.float64:
        reasons.append("fp64 tensors run on eager only")
    elif x.dtype != torch.float32:
        reasons.append("in 16 bits PyTorch's own products, eager's, are oneDNN's already")
    return reasons


def _common(qkv: Tensor, dropout_p: float, seed: int | Tensor | None) -> list[str]:
    reasons = []
    if qkv.dtype == torch.float64:
        reasons.append("fp64 tensors run on eager only")
    if dropout_p and seed is not None:
        reasons.append("its dropout cannot draw the bits that a seed stands for, leave the seed out")
    return reasons


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _host_must_not_read(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
