"""Eager moving average: t += (1 - decay) * (s - t) over lists of tensors, in the teacher's precision.

Pairs of equal dtype and device go to one foreach call; a student of another dtype is cast tensor by tensor,
so one cast tensor exists at a time. What is read and written: teacher and student once, plus the copies.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from d2vkern import _costs
from d2vkern._nvtx import op_range


@op_range("ema/fwd/eager", _costs.ema)
def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    copies: Sequence[Tensor | None],
) -> None:
    """In place on `teacher` and `copies`; see d2vkern.ops.ema."""
    average_(teacher, student, decay, copies)


def average_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    copies: Sequence[Tensor | None],
) -> None:
    """`ema_update_` as a part of another op, without a range of its own."""
    groups: defaultdict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for t, s in zip(teacher, student, strict=True):
        if t.dtype == s.dtype:
            group = groups[t.dtype, t.device]
            group[0].append(t)
            group[1].append(s.detach())
        else:
            t.lerp_(s.detach().to(t.dtype), _weight(decay, t))
    for teachers, students in groups.values():
        weight = _weight(decay, teachers[0])
        if isinstance(weight, Tensor):
            torch._foreach_lerp_(teachers, students, [weight] * len(teachers))
        else:
            torch._foreach_lerp_(teachers, students, weight)
    for t, copy in zip(teacher, copies, strict=True):
        if copy is not None:
            copy.copy_(t)


def _weight(decay: float | Tensor, like: Tensor) -> float | Tensor:
    """1 - decay; a tensor is subtracted in fp64, because fp32 would leave 1 - 0.99999 two digits short."""
    if isinstance(decay, Tensor):
        return (1.0 - decay.double()).to(device=like.device, dtype=like.dtype)
    return 1.0 - decay
