"""What hangs on an optimizer's parameters: teachers and copies, and the buffers of a teacher module."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from d2vkern._checks import check_choice, check_shape
from d2vkern.ops import _averages
from d2vkern.ops.ema import EMA, ema_update_

Attached = Mapping[Tensor, Tensor] | Iterable[Tensor | None] | Iterable[tuple[str, Tensor]] | nn.Module | None
_OP = "adamw_ema"


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside, of an average too."""
    if isinstance(module, (EMA, AveragedModel)):
        module = module.module
    return _averages.unwrapped(module)


def by_param(
    name: str, given: Attached, groups: list[dict[str, Any]], model: nn.Module | None
) -> dict[Tensor, Tensor]:
    """Which tensor belongs to which parameter.

    given: as AdamWEMA's teacher; model: whose parameters have a module's names.
    """
    if given is None:
        return {}
    if isinstance(given, nn.Module):
        return _by_name(name, dict(unwrapped(given).named_parameters()), _names(name, groups, model))
    if isinstance(given, Mapping):
        return dict(given)
    params = [p for group in groups for p in group["params"]]
    entries: list[Any] = list(given)
    if entries and all(isinstance(entry, tuple) for entry in entries):
        return _by_name(name, dict(entries), _names(name, groups, model))
    if len(entries) != len(params):
        raise ValueError(f"{_OP}: {name} must have {len(params)} entries like params, got {len(entries)}")
    for i, (p, tensor) in enumerate(zip(params, entries, strict=True)):
        if tensor is not None:
            check_shape(_OP, f"{name}[{i}]", tensor, tuple(p.shape), like=f"params[{i}]")
    return {p: tensor for p, tensor in zip(params, entries, strict=True) if tensor is not None}


def _names(name: str, groups: list[dict[str, Any]], model: nn.Module | None) -> dict[str, Tensor]:
    """The parameters under their names: the model's, or those the optimizer was given."""
    if model is not None:
        return dict(unwrapped(model).named_parameters())
    if not all("param_names" in group for group in groups):
        raise ValueError(
            f"{_OP}: {name} by names must come with model, or params as named_parameters(), got neither"
        )
    return {key: p for group in groups for key, p in zip(group["param_names"], group["params"], strict=True)}


def _by_name(name: str, given: dict[str, Tensor], params: dict[str, Tensor]) -> dict[Tensor, Tensor]:
    if given.keys() != params.keys():
        odd = sorted(given.keys() ^ params.keys())[0]
        raise ValueError(f"{_OP}: {name} must have the names of the parameters, got a difference at {odd}")
    for key, p in params.items():
        check_shape(_OP, f"{name} {key}", given[key], tuple(p.shape), like="its parameter")
    return {p: given[key] for key, p in params.items()}


class Buffers:
    """The buffers of a teacher module, which follow the model's.

    They are looked up at every update, as modules may put new tensors in their place.
    """

    def __init__(self, teacher: nn.Module, model: nn.Module, how: str) -> None:
        check_choice(_OP, "teacher_buffers", how, ("average", "copy"))
        self.teacher, self.model, self.how = unwrapped(teacher), unwrapped(model), how
        self._pairs()

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = dict(self.teacher.named_buffers()), dict(self.model.named_buffers())
        if ours.keys() != theirs.keys():
            odd = sorted(ours.keys() ^ theirs.keys())[0]
            raise ValueError(f"{_OP}: teacher must have the buffers of model, got a difference at {odd}")
        for key, tensor in theirs.items():
            check_shape(_OP, f"teacher's buffer {key}", ours[key], tuple(tensor.shape), like="model's")
        return [(ours[key], tensor) for key, tensor in theirs.items()]

    def update(self, decay: float | Tensor, backend: str | None) -> None:
        """Floating buffers are averaged, or copied with how="copy"; integers and the like are copied.

        Of bf16 and fp16 buffers the average would never move: they are copied.
        """
        pairs = self._pairs()
        wide = (torch.float32, torch.float64) if self.how == "average" else ()
        averaged = [(mine, theirs) for mine, theirs in pairs if mine.dtype in wide]
        ema_update_([m for m, _ in averaged], [t for _, t in averaged], decay, backend=backend)
        for mine, theirs in pairs:
            if mine.dtype not in wide:
                mine.copy_(theirs)
