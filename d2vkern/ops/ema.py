"""Exponential moving average of weights: the data2vec teacher.

`ema_update_` is the op, on lists of tensors; `EMA` is a module that owns the averaged model, with the decay
schedule of data2vec 2.0, usable where torch.optim.swa_utils.AveragedModel or timm's ModelEma is.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from d2vkern._backend import select
from d2vkern._checks import FLOATS, check_dtype, check_range, check_same_device, check_shape
from d2vkern._overlap import check_memory, have_addresses, identity
from d2vkern._shards import any_sharded, check_same_shards, local
from d2vkern.ops._averages import SETTINGS, TorchRule, annealed_decay, make_rule, unwrapped

__all__ = ["EMA", "annealed_decay", "check_lists", "ema_update_"]

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
    A pair that stands in the lists twice (tied weights) is updated once.
    DTensors are updated shard by shard; those of a pair must be distributed alike.
    Source: fairseq/modules/ema_module.py, `_step_internal`.

    Raises ValueError for lists of different lengths, shapes or devices (naming the pair), a low-precision
    teacher, teachers or copies that overlap in memory with each other or with students, or a decay out of
    range; TypeError for tensors that are not floating.
    """
    if copies is None:
        copies = [None] * len(teacher)
    check_lists("ema", teacher, student, copies)
    teacher, student, copies = local(teacher), local(student), local(copies)
    teacher, student, copies, more = _each_once(teacher, student, copies)
    check_memory("ema", [("teacher", teacher), ("copies", copies)], [("student", student)], in_step=True)
    if isinstance(decay, Tensor):
        check_shape("ema", "decay", decay, ())
    else:
        check_range("ema", "decay", decay, minimum=0.0, maximum=1.0)
        if decay == 1.0:
            for t, low in (*zip(teacher, copies, strict=True), *more):
                if low is not None:
                    low.copy_(t)
            return
    if len(teacher) > 0:
        tensors = (*teacher, *student, *(low for low in copies if low is not None))
        select("ema", backend, *tensors).ema_update_(teacher, student, decay, copies)
        for t, low in more:
            low.copy_(t)


def _each_once(
    teacher: list[Tensor], student: list[Tensor], copies: list[Tensor | None]
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """The lists without pairs that stand in them before (tied weights), and (teacher, copy) of those."""
    if torch.compiler.is_compiling() or not teacher or not have_addresses([*teacher, *student]):
        return teacher, student, copies, []
    if len(set(map(Tensor.data_ptr, teacher))) == len(teacher):
        return teacher, student, copies, []
    rows: dict[object, int] = {}
    more = []
    for i, (t, s, low) in enumerate(zip(teacher, student, copies, strict=True)):
        first = rows.setdefault((identity(t), identity(s), i * (t.numel() == 0)), i)
        if first < i and low is not None and low is not copies[first]:
            more.append((teacher[first], low))
    kept = list(rows.values())
    return [teacher[i] for i in kept], [student[i] for i in kept], [copies[i] for i in kept], more


class EMA(nn.Module):
    """Owns `module`, a copy of a model whose weights follow the model's as a moving average.

    Positional arguments are those of timm's ModelEmaV3 (1.0.31), in its order.

    decay, end_decay, anneal: as in data2vec 2.0, from `decay` (0.9998) to `end_decay` (None: constant) over
        `anneal` steps, see `annealed_decay`. A decay of 1 stops the average. Parameters with requires_grad
        False and buffers are copied, not averaged.
    like: "data2vec", "timm" or "torch"; None: the one whose arguments are given, else data2vec's.
    min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, exclude_buffers: those of timm's
        ModelEmaV3, with its numbers (decay 0.9999; all parameters and floating buffers are averaged;
        `update(model, step)`, `set`, `get_decay`). Its stochastic_rounding, stochastic_rounding_seed and
        foreach change nothing: an average in fp32 is rounded to nothing coarser.
    avg_fn, multi_avg_fn, use_buffers: those of torch.optim.swa_utils.AveragedModel, with its numbers (all
        parameters are averaged; the first update copies); `decay` is its get_ema_multi_avg_fn(decay), without
        decay and functions it is the equal average of SWA.
    device: where the copy is held, by default the model's; in timm's and torch's form too.
    dtype: of the copy's floating parameters and buffers, fp32 or fp64; None: the model's, fp32 for bf16 and
        fp16. Those two are refused: with decay 0.9998 the update is below their last digit.
    Buffers that are no floats are copied, as timm's (torch's use_buffers truncates their average).
    Arguments that say how to average are attributes too, and may be set: `ema.decay = 0.99`.
    The copy starts equal to the model, needs no gradient and is in eval mode. Models in
    DistributedDataParallel or torch.compile count as what is inside. A model that is fully_shard'ed cannot be
    copied: make the average first, then shard both alike (`fully_shard(ema.module)`); DTensors are averaged.
    State dict: `module.*` and `n_averaged`, as AveragedModel's; in timm's form without the latter, as
        ModelEmaV3's. Either loads into any.

    Raises ValueError for a value out of range, for arguments of several kinds and for a sharded model,
    TypeError for a decay that is no number or another dtype.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        decay: float | None = None,
        min_decay: float | None = None,
        update_after_step: int | None = None,
        use_warmup: bool | None = None,
        warmup_gamma: float | None = None,
        warmup_power: float | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        stochastic_rounding_seed: int | None = None,
        foreach: bool | None = None,
        exclude_buffers: bool | None = None,
        *,
        end_decay: float | None = None,
        anneal: int = 0,
        like: str | None = None,
        avg_fn: Callable[..., Any] | None = None,
        multi_avg_fn: Callable[..., Any] | None = None,
        use_buffers: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        others = {
            "min_decay": min_decay,
            "update_after_step": update_after_step,
            "use_warmup": use_warmup,
            "warmup_gamma": warmup_gamma,
            "warmup_power": warmup_power,
            "exclude_buffers": exclude_buffers,
            "stochastic_rounding": stochastic_rounding,
            "stochastic_rounding_seed": stochastic_rounding_seed,
            "foreach": foreach,
            "avg_fn": avg_fn,
            "multi_avg_fn": multi_avg_fn,
            "use_buffers": use_buffers,
        }
        given = {name: value for name, value in others.items() if value is not None}
        if not isinstance(decay, (int, float, type(None))):
            raise TypeError(f"ema: decay must be a number (a device goes by name), got {decay!r}")
        if dtype not in (None, *_TEACHER_DTYPES):
            raise TypeError(f"ema: dtype must be float32 or float64 (others never move), got {dtype}")
        self.rule = make_rule(like, decay, end_decay, anneal, given)
        self.module = _copied(unwrapped(model)).requires_grad_(False).eval()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()
        if dtype is not None:
            self.module.to(dtype)
        if device is not None:
            self.module.to(device)
        self.backend = backend
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64), persistent=self.rule.counts)

    def __getattr__(self, name: str) -> Any:
        rule = self.__dict__.get("rule")
        return getattr(rule, name) if name in SETTINGS and hasattr(rule, name) else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SETTINGS:
            return super().__setattr__(name, value)
        if not hasattr(self.rule, name):
            raise AttributeError(f"ema: {name} must be set on an average that has it, got {self.rule}")
        self.rule = replace(self.rule, **{name: value})

    def train(self, mode: bool = True) -> "EMA":
        """Keeps the averaged module in eval mode, whatever mode its owner goes into.

        In torch's form it goes along, as AveragedModel's: torch.optim.swa_utils.update_bn wants it to.
        """
        super().train(mode)
        if not isinstance(self.rule, TorchRule):
            self.module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's forward."""
        return self.module(*args, **kwargs)

    def decay_at(self, step: int) -> float:
        """Decay of update number `step`, counted from 1."""
        return self.rule.decay_at(step)

    def get_decay(self, step: int | None = None) -> float:
        """As ModelEmaV3's: of the update with that step, None: of one that is given none."""
        return self.rule.decay_at(int(self.n_averaged) + 1 if step is None and self.rule.counts else step)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int | None = None) -> None:
        """Move the average towards `student` after optimizer step number `step` (the first is 1).

        step: None is one more than the last (in timm's form: the constant decay); with the module on a GPU
            that read is a host sync, giving the step is not.
        Raises ValueError when the student's parameters or buffers are not the copy's.
        """
        if step is None and self.rule.counts:
            step = int(self.n_averaged) + 1
        decay = self.rule.decay_at(step)
        if decay < 1.0:
            averaged, copied = self._pairs(unwrapped(student))
            before = self.n_averaged if step is None else torch.full_like(self.n_averaged, step - 1)
            first = isinstance(self.rule, TorchRule) and step == 1
            if first or not (isinstance(self.rule, TorchRule) and self.rule.by_function(averaged, before)):
                ema_update_([t for t, _ in averaged], [s for _, s in averaged], decay, backend=self.backend)
            for ours, theirs in copied:
                ours.copy_(theirs)
        if step is None:
            self.n_averaged.add_(1)
        else:
            self.n_averaged.fill_(step)

    def update_parameters(self, model: nn.Module) -> None:
        """`update` under AveragedModel's name."""
        self.update(model)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the average equal to the model, as ModelEmaV3's."""
        for pairs in self._pairs(unwrapped(model)):
            for ours, theirs in pairs:
                ours.copy_(theirs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """ModelEmaV3 does not count its updates."""
        if self.rule.counts:
            state_dict.setdefault(f"{prefix}n_averaged", self.n_averaged)
        else:
            state_dict.pop(f"{prefix}n_averaged", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _pairs(self, student: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(averaged, copied): the pairs (ours, student's) of what is averaged, and of all the rest."""
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
                mine = ours[name]
                if tensor.shape != mine.shape:
                    check_shape("ema", name, tensor, tuple(mine.shape), like="the averaged module's")
                there = tensor if tensor.device == mine.device else tensor.to(mine.device)
                (averaged if self.rule.averages(tensor, kind == "buffers") else copied).append((mine, there))
        return averaged, copied


def _copied(model: nn.Module) -> nn.Module:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
        if any(isinstance(module, kinds) for module in model.modules()):
            raise ValueError(
                "ema: model must be whole when it is copied (make the average first, then shard both alike: "
                "fully_shard(ema.module)), got a fully sharded one"
            )
    return copy.deepcopy(model)


def check_lists(
    op: str, teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor | None]
) -> None:
    """Raise unless teacher, student and copies pair up in number, shape, device and dtype."""
    for name, tensors in (("student", student), ("copies", copies)):
        if len(tensors) != len(teacher):
            raise ValueError(
                f"{op}: {name} must have {len(teacher)} tensors like teacher, got {len(tensors)}"
            )
    sharded = any_sharded(teacher) or any_sharded(student) or any_sharded(copies)
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
            if sharded:
                check_same_shards(op, f"{kind}[{index}]", tensor, f"teacher[{index}]", t)
