"""Moving average of many tensors by the compiled extension: csrc/ema.cpp on CPUs, csrc/ema.cu on CUDA."""

from typing import Any

import torch
from torch import Tensor

from d2vkern import _native
from d2vkern.functions.ema import EMA_UPDATE, columns_of, ema_update_with
from d2vkern.native._chunks import changed, run_chunks


def _run_cuda(*call: Any) -> None:
    run_chunks("ema", torch.ops.d2vkern_native.ema_update_chunks_, columns_of(*call[:4]), call[4:])


_update = EMA_UPDATE.native()
_native.implement_cuda("ema_update_", _run_cuda)


def _updated(
    teacher: list[Tensor],
    student: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    decay: float,
    decay_tensor: Tensor | None,
) -> None:
    _update(teacher, student, copies, copied, decay, decay_tensor)
    changed(teacher, copies)


ema_update_ = ema_update_with(_updated)
