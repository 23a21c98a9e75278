"""ema_update_ of a backend's kernel."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._library import Kernel
from d2vkern.kernels._table import Column

EMA_UPDATE = Kernel(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, Tensor(b!)[] copies, int[] copied, float decay, "
    "Tensor? decay_tensor) -> ()",
    "ema/fwd",
    lambda *_: None,
    lambda teacher, student, copies, *_: _costs.ema(teacher, student, None, copies),
)


def columns_of(
    teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], copied: list[int]
) -> tuple[Column, ...]:
    """The table of a call on a GPU."""
    return (
        Column("teacher", teacher, written=True),
        Column("student", student),
        Column("copies", copies, copied, written=True),
    )


def ema_update_with(update: Callable[..., None]) -> Callable[..., None]:
    """ema_update_ of a kernel called as EMA_UPDATE, once per device."""

    def ema_update_(
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        decay: float | Tensor,
        copies: Sequence[Tensor | None],
    ) -> None:
        rows: defaultdict[torch.device, list[int]] = defaultdict(list)
        for i, t in enumerate(teacher):
            rows[t.device].append(i)
        for device, here in rows.items():
            number, tensor = (0.0, decay.to(device)) if isinstance(decay, Tensor) else (float(decay), None)
            low, copied = present([copies[i] for i in here])
            update([teacher[i] for i in here], [student[i] for i in here], low, copied, number, tensor)

    return ema_update_


def present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and their rows."""
    rows = [i for i, tensor in enumerate(tensors) if tensor is not None]
    return [tensor for tensor in tensors if tensor is not None], rows
