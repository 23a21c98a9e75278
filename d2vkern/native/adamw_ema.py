"""AdamW, teacher and copies in one pass by the compiled extension: csrc/adamw_ema.cpp and csrc/adamw_ema.cu.

The norm of gradients is csrc/grad_norm.cpp's on CPUs and PyTorch's on CUDA, where it is a launch or a few.

On CUDA the addresses wait in a table on the device, made here (kernels/_table.py) when one of them is new.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2vkern import _costs, _native
from d2vkern._nvtx import op_range
from d2vkern.kernels._table import Column, table_of
from d2vkern.native.ema import changed, present
from d2vkern.reference import adamw_ema as eager

CHUNK = 8192
"""elements that a block of threads does"""


def _run_cuda(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    teachers: list[Tensor],
    taught: list[int],
    copies: list[Tensor],
    copied: list[int],
    teacher_copies: list[Tensor],
    teacher_copied: list[int],
    *settings: Any,
) -> None:
    columns = (
        Column("params", params, written=True),
        Column("grads", grads),
        Column("exp_avgs", exp_avgs, written=True),
        Column("exp_avg_sqs", exp_avg_sqs, written=True),
        Column("teachers", teachers, taught, written=True),
        Column("copies", copies, copied, written=True),
        Column("teacher_copies", teacher_copies, teacher_copied, written=True),
    )
    with table_of("adamw_ema", columns, CHUNK, "native") as table:
        kinds = [code for kind in table.kinds for code in kind]
        torch.ops.d2vkern_native.adamw_ema_chunks_(table.data, table.programs, CHUNK, kinds, *settings)


_step = _native.op("adamw_ema_", lambda *arguments: None)
_native.implement_cuda("adamw_ema_", _run_cuda)
_norm = _native.op("l2_norm", lambda tensors: tensors[0].new_empty((), dtype=torch.float32))


@op_range("adamw_ema/fwd/native", _costs.adamw_ema)
def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: float | list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    eps_mode: str,
    clip_factor: float | Tensor | None,
    teachers: Sequence[Tensor | None],
    ema_decay: float | Tensor | None,
    copies: Sequence[Tensor | None],
    teacher_copies: Sequence[Tensor | None],
    found_inf: Tensor | None = None,
) -> None:
    """One pass; arguments as d2vkern.reference.adamw_ema's, but grads stay as they are."""
    device = params[0].device
    if ema_decay is None:
        teachers = teacher_copies = [None] * len(params)
    taught, taught_rows = present(teachers)
    low, low_rows = present(copies)
    taught_low, taught_low_rows = present(teacher_copies)
    numbers, tensors = [], []
    step = steps[0] if isinstance(steps, list) else steps
    for value in (clip_factor, ema_decay, step, lr):
        # Of the two the op takes the tensor; 1 is as good as None.
        tensors.append(value.to(device) if isinstance(value, Tensor) else None)
        numbers.append(1.0 if value is None or isinstance(value, Tensor) else float(value))
    _step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        taught,
        taught_rows,
        low,
        low_rows,
        taught_low,
        taught_low_rows,
        found_inf,
        *tensors,
        *numbers,
        *betas,
        eps,
        weight_decay,
        eps_mode == "fairseq",
    )
    changed(device, params, exp_avgs, exp_avg_sqs, taught, low, taught_low)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """Arguments as d2vkern.reference.adamw_ema's."""
    return _cpu_norm(grads) if all(g.device.type == "cpu" for g in grads) else eager.grad_norm(grads)


@op_range("grad_norm/fwd/native", _costs.grad_norm)
def _cpu_norm(grads: list[Tensor]) -> Tensor:
    return _norm(grads)
