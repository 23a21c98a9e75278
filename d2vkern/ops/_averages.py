"""How an `EMA` averages: data2vec 2.0's way, that of timm's ModelEmaV3, and that of torch's AveragedModel.

A rule says with which decay an update is done, and which tensors are averaged; the others are copied. Written
from timm/utils/model_ema.py (1.0.31) and torch/optim/swa_utils.py (2.13).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from d2vkern._checks import check_range

TIMM = ("min_decay", "update_after_step", "use_warmup", "warmup_gamma", "warmup_power", "exclude_buffers")
TORCH = ("avg_fn", "multi_avg_fn", "use_buffers")
UNUSED = ("stochastic_rounding", "stochastic_rounding_seed", "foreach")
"""of timm's: how bf16 averages, which there are none of, are rounded, and how its sums are made"""
LIKE = {"data2vec": (), "timm": (*TIMM, *UNUSED), "torch": TORCH}


def annealed_decay(step: int, decay: float, end_decay: float, anneal: int) -> float:
    """The decay of an update: linear from `decay` to `end_decay` over `anneal` steps; the first step is 1.

    Source: data2vec 2.0, examples/data2vec/models/data2vec2.py, `get_annealed_rate` and `set_num_updates`.
    """
    if step >= anneal:
        return end_decay
    return end_decay - (end_decay - decay) * (1.0 - step / anneal)


@dataclass(frozen=True)
class Data2VecRule:
    """Trained parameters are averaged, buffers and frozen parameters copied."""

    decay: float = 0.9998
    end_decay: float | None = None
    anneal: int = 0

    counts = True
    """without a step given, an update's number is one more than the last"""

    def __post_init__(self) -> None:
        check_range("ema", "decay", self.decay, minimum=0.0, maximum=1.0)
        check_range("ema", "anneal", self.anneal, minimum=0)
        if self.end_decay is not None:
            check_range("ema", "end_decay", self.end_decay, minimum=0.0, maximum=1.0)

    def decay_at(self, step: int | None) -> float:
        assert step is not None
        end = self.decay if self.end_decay is None else self.end_decay
        return annealed_decay(step, self.decay, end, self.anneal)

    def averages(self, tensor: Tensor, is_buffer: bool) -> bool:
        return tensor.requires_grad


@dataclass(frozen=True)
class TimmRule:
    """Parameters and floating buffers are averaged (buffers copied with exclude_buffers).

    Without a step given the decay is constant; with one, counted from 1, the first update and those up to
    `update_after_step` copy, and the decay may warm up.
    """

    decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    use_warmup: bool = False
    warmup_gamma: float = 1.0
    warmup_power: float = 2.0 / 3.0
    exclude_buffers: bool = False

    counts = False

    def __post_init__(self) -> None:
        check_range("ema", "decay", self.decay, minimum=0.0, maximum=1.0)
        check_range("ema", "min_decay", self.min_decay, minimum=0.0, maximum=1.0)
        check_range("ema", "update_after_step", self.update_after_step, minimum=0)
        if not self.warmup_gamma > 0.0:
            raise ValueError(f"ema: warmup_gamma must be > 0, got {self.warmup_gamma}")

    def decay_at(self, step: int | None) -> float:
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        warm = 1.0 - (1.0 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(warm, self.decay), self.min_decay)

    def averages(self, tensor: Tensor, is_buffer: bool) -> bool:
        return tensor.is_floating_point() and not (is_buffer and self.exclude_buffers)


@dataclass(frozen=True)
class TorchRule:
    """All parameters are averaged, with use_buffers floating buffers too; the first update copies everything.

    decay None: the average of all models so far, as for SWA. avg_fn(average, model, n) for one tensor or
    multi_avg_fn(averages, models, n) for lists of one dtype and device take the place of the formula.
    """

    decay: float | None = None
    avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    multi_avg_fn: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None] | None = None
    use_buffers: bool = False

    counts = True

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_range("ema", "decay", self.decay, minimum=0.0, maximum=1.0)
        if sum(x is not None for x in (self.decay, self.avg_fn, self.multi_avg_fn)) > 1:
            raise ValueError("ema: only one of decay, avg_fn and multi_avg_fn may be given")

    def decay_at(self, step: int | None) -> float:
        assert step is not None
        if step <= 1:
            return 0.0
        return (step - 1) / step if self.decay is None else self.decay

    def averages(self, tensor: Tensor, is_buffer: bool) -> bool:
        return tensor.is_floating_point() and (self.use_buffers or not is_buffer)

    def by_function(self, pairs: list[tuple[Tensor, Tensor]], before: Tensor) -> bool:
        """Whether a function of the user's has done the update; before: updates done until now."""
        if self.avg_fn is not None:
            for ours, theirs in pairs:
                ours.copy_(self.avg_fn(ours, theirs, before))
        elif self.multi_avg_fn is not None:
            groups: defaultdict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for ours, theirs in pairs:
                groups[ours.dtype, ours.device].append((ours, theirs.to(ours.dtype)))
            for group in groups.values():
                self.multi_avg_fn([ours for ours, _ in group], [theirs for _, theirs in group], before)
        return self.avg_fn is not None or self.multi_avg_fn is not None


Rule = Data2VecRule | TimmRule | TorchRule
SETTINGS = {field.name for rule in (Data2VecRule, TimmRule, TorchRule) for field in fields(rule)}


def make_rule(
    like: str | None, decay: float | None, end_decay: float | None, anneal: int, others: dict[str, Any]
) -> Rule:
    """The rule of an EMA's arguments; an argument of timm's or torch's chooses theirs.

    others: the arguments that were given, by name.
    """
    wanted = [name for name in LIKE if any(argument in others for argument in LIKE[name])]
    if like is not None and like not in LIKE:
        raise ValueError(f"ema: like must be one of {', '.join(map(repr, LIKE))}, got {like!r}")
    if len(wanted) > 1 or (like is not None and wanted not in ([], [like])):
        raise ValueError(f"ema: {', '.join(others)} must be arguments of {like or 'one kind of average'}")
    like = like or (wanted[0] if wanted else "data2vec")
    if like != "data2vec" and (end_decay is not None or anneal):
        raise ValueError(f"ema: end_decay and anneal must be left out of an average like {like}'s")
    given: dict[str, Any] = {} if decay is None else {"decay": decay}
    if like == "timm":
        return TimmRule(**given, **{name: value for name, value in others.items() if name not in UNUSED})
    if like == "torch":
        return TorchRule(**given, **others)
    return Data2VecRule(**given, end_decay=end_decay, anneal=anneal)


def unwrapped(model: Any) -> torch.nn.Module:
    """The model inside DistributedDataParallel and torch.compile, whose parameters have its own names."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
