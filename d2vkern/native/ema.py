"""Moving average of many tensors by the compiled extension: csrc/ema.cpp on CPUs, csrc/ema.cu on CUDA.

On CUDA the addresses wait in a table on the device, made here (kernels/_table.py) when one of them is new.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from d2vkern import _costs, _native
from d2vkern._nvtx import op_range
from d2vkern.kernels._table import Column, table_of

CHUNK = 8192
"""elements that a block of threads does"""


def _run_cuda(
    teacher: list[Tensor],
    student: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    decay: float,
    decay_tensor: Tensor | None,
) -> None:
    columns = (
        Column("teacher", teacher, written=True),
        Column("student", student),
        Column("copies", copies, copied, written=True),
    )
    with table_of("ema", columns, CHUNK, "native") as table:
        kinds = [code for kind in table.kinds for code in kind]
        torch.ops.d2vkern_native.ema_update_chunks_(
            table.data, table.programs, CHUNK, kinds, decay, decay_tensor
        )


_update = _native.op("ema_update_", lambda teacher, student, copies, copied, decay, decay_tensor: None)
_native.implement_cuda("ema_update_", _run_cuda)


@op_range("ema/fwd/native", _costs.ema)
def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    copies: Sequence[Tensor | None],
) -> None:
    """In place on `teacher` and `copies`, one call per device; see d2vkern.ops.ema."""
    rows: defaultdict[torch.device, list[int]] = defaultdict(list)
    for i, t in enumerate(teacher):
        rows[t.device].append(i)
    for device, here in rows.items():
        number, tensor = (0.0, decay.to(device)) if isinstance(decay, Tensor) else (float(decay), None)
        averages = [teacher[i] for i in here]
        low, copied = present([copies[i] for i in here])
        _update(averages, [student[i] for i in here], low, copied, number, tensor)
        changed(device, averages, low)


def present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and their rows."""
    rows = [i for i, tensor in enumerate(tensors) if tensor is not None]
    return [tensor for tensor in tensors if tensor is not None], rows


def changed(device: torch.device, *lists: list[Tensor]) -> None:
    """Let autograd know that tensors were changed: C++ ops do not say so themselves.

    On CUDA the table does, and what a compiler traces needs no telling.
    """
    if device.type == "cpu" and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensors in lists for tensor in tensors])
