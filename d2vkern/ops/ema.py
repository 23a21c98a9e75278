"""Exponential moving average of weights: the data2vec teacher.

`ema_update_` is the op, on lists of tensors; `EMA` is a module that owns the averaged model, with the decay
schedule of data2vec 2.0, usable where torch.optim.swa_utils.AveragedModel or timm's ModelEma is.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2vkern._backend import select
from d2vkern._checks import FLOATS, check_dtype, check_range, check_same_device, check_shape

_TEACHER_DTYPES = (torch.float32, torch.float64)


@torch.no_grad()
def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    copies: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> None:
    """teacher = decay * teacher + (1 - decay) * student, in place, tensor by tensor.

    teacher: fp32 (or fp64) tensors, mutated. A bf16 or fp16 average is refused: with decay 0.9998 the update
        is below its last digit, so it would never move.
    student: as many tensors of the same shapes, any floating dtype per tensor.
    decay: a number in [0, 1], or a 0-dim tensor (no host sync; its range is not checked). Give the tensor
        fp64: 0.99999 in fp32 puts an error of 0.3% on 1 - decay. Exactly 1, as a number, leaves teachers
        untouched.
    copies: per pair None or a tensor of the same shape, any floating dtype, that receives the new teacher.
    Source: fairseq/modules/ema_module.py, `_step_internal`.

    Raises ValueError for lists of different lengths, shapes or devices (naming the pair), a low-precision
    teacher, or a decay out of range; TypeError for tensors that are not floating.
    """
    if copies is None:
        copies = [None] * len(teacher)
    check_lists("ema", teacher, student, copies)
    if isinstance(decay, Tensor):
        check_shape("ema", "decay", decay, ())
    else:
        check_range("ema", "decay", decay, minimum=0.0, maximum=1.0)
        if decay == 1.0:
            for t, low in zip(teacher, copies, strict=True):
                if low is not None:
                    low.copy_(t)
            return
    if len(teacher) > 0:
        tensors = (*teacher, *student, *(low for low in copies if low is not None))
        select("ema", backend, *tensors).ema_update_(teacher, student, decay, copies)


def annealed_decay(step: int, decay: float, end_decay: float, anneal: int) -> float:
    """The decay of an update: linear from `decay` to `end_decay` over `anneal` steps; the first step is 1.

    Source: data2vec 2.0, examples/data2vec/models/data2vec2.py, `get_annealed_rate` and `set_num_updates`.
    """
    if step >= anneal:
        return end_decay
    return end_decay - (end_decay - decay) * (1.0 - step / anneal)


class EMA(nn.Module):
    """Owns `module`, a copy of a model whose weights follow the model's as a moving average.

    decay, end_decay, anneal: see `annealed_decay`; end_decay None keeps `decay` throughout. A decay of 1
        stops the average.
    The copy starts equal to the model (AveragedModel copies at its first update instead), is held in fp32
    when the model is bf16 or fp16, needs no gradient and is in eval mode. Parameters with requires_grad False
    and buffers are copied, not averaged. State dict: `module.*` and `n_averaged`, as AveragedModel's.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9998,
        end_decay: float | None = None,
        anneal: int = 0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_range("ema", "decay", decay, minimum=0.0, maximum=1.0)
        check_range("ema", "anneal", anneal, minimum=0)
        if end_decay is not None:
            check_range("ema", "end_decay", end_decay, minimum=0.0, maximum=1.0)
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        self.decay = decay
        self.end_decay = decay if end_decay is None else end_decay
        self.anneal = anneal
        self.backend = backend
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "EMA":
        """Keeps the averaged module in eval mode, whatever mode its owner goes into."""
        super().train(mode)
        self.module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's forward."""
        return self.module(*args, **kwargs)

    def decay_at(self, step: int) -> float:
        """Decay of update number `step`, counted from 1."""
        return annealed_decay(step, self.decay, self.end_decay, self.anneal)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int | None = None) -> None:
        """Move the average towards `student` after optimizer step number `step` (the first is 1).

        step: None is one more than the last; with the module on a GPU that read is a host sync, giving the
            step is not.
        Raises ValueError when the student's parameters or buffers are not the copy's.
        """
        if step is None:
            step = int(self.n_averaged) + 1
        self.n_averaged.fill_(step)
        decay = self.decay_at(step)
        if decay == 1.0:
            return
        averaged, copied = self._pairs(student)
        ema_update_([t for t, _ in averaged], [s for _, s in averaged], decay, backend=self.backend)
        for ours, theirs in copied:
            ours.copy_(theirs)

    def update_parameters(self, model: nn.Module) -> None:
        """`update` under AveragedModel's name."""
        self.update(model)

    def _pairs(self, student: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(averaged, copied): the pairs (ours, student's) of trained parameters, and of all the rest."""
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for kind in ("parameters", "buffers"):
            ours = dict(getattr(self.module, f"named_{kind}")())
            theirs = dict(getattr(student, f"named_{kind}")())
            if ours.keys() != theirs.keys():
                odd = sorted(ours.keys() ^ theirs.keys())[0]
                raise ValueError(
                    f"ema: student must have the {kind} of the averaged module, got a difference at {odd}"
                )
            for name, tensor in theirs.items():
                check_shape("ema", name, tensor, tuple(ours[name].shape), like="the averaged module's")
                (averaged if tensor.requires_grad else copied).append((ours[name], tensor))
        return averaged, copied


def check_lists(
    op: str, teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor | None]
) -> None:
    """Raise unless teacher, student and copies pair up in number, shape, device and dtype."""
    for name, tensors in (("student", student), ("copies", copies)):
        if len(tensors) != len(teacher):
            raise ValueError(
                f"{op}: {name} must have {len(teacher)} tensors like teacher, got {len(tensors)}"
            )
    for index, (t, s, low) in enumerate(zip(teacher, student, copies, strict=True)):
        if t.dtype not in _TEACHER_DTYPES:
            raise ValueError(
                f"{op}: teacher[{index}] must have dtype float32 or float64 "
                f"(a low-precision average never moves), got {t.dtype}"
            )
        for kind, tensor in (("student", s), ("copies", low)):
            if tensor is None:
                continue
            if tensor.shape != t.shape or tensor.device != t.device or tensor.dtype not in FLOATS:
                # a step checks hundreds of pairs: words are made for the wrong one only
                name = f"{kind}[{index}]"
                check_shape(op, name, tensor, tuple(t.shape), like=f"teacher[{index}]")
                check_dtype(op, name, tensor)
                check_same_device(op, **{f"teacher[{index}]": t, name: tensor})
