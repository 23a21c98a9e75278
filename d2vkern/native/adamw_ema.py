"""AdamW, teacher and copies in one pass by the compiled extension: csrc/adamw_ema.cpp and csrc/adamw_ema.cu.

The norm of gradients is csrc/grad_norm.cpp's on CPUs and PyTorch's on CUDA, where it is a launch or a few.
"""

from typing import Any

import torch
from torch import Tensor

from d2vkern import _costs, _native
from d2vkern._library import Kernel
from d2vkern.functions.adamw_ema import ADAMW_EMA, adamw_ema_with, columns_of
from d2vkern.native._chunks import changed, run_chunks
from d2vkern.reference import adamw_ema as eager


def _run_cuda(*call: Any) -> None:
    run_chunks("adamw_ema", torch.ops.d2vkern_native.adamw_ema_chunks_, columns_of(*call[:10]), call[10:])


_step = ADAMW_EMA.native()
_native.implement_cuda("adamw_ema_", _run_cuda)
_cpu_norm = Kernel(
    "l2_norm(Tensor[] tensors) -> Tensor",
    "grad_norm/fwd",
    lambda tensors: tensors[0].new_empty((), dtype=torch.float32),
    _costs.grad_norm,
).native()


def _stepped(*call: Any) -> None:
    _step(*call[:-1], call[-1] == "fairseq")  # the extension's last argument is a bool
    changed(call[0], call[2], call[3], call[4], call[6], call[8])


adamw_ema_ = adamw_ema_with(_stepped)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """Arguments as d2vkern.reference.adamw_ema's."""
    return _cpu_norm(grads) if all(g.device.type == "cpu" for g in grads) else eager.grad_norm(grads)
