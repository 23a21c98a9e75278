"""What a bench_<op>.py declares: a case, its inputs and cost, and how to run it forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import d2vkern

Inputs = dict[str, Any]
Outputs = Tensor | dict[str, Tensor]
Call = Callable[[Inputs], Outputs]


class Unavailable(RuntimeError):
    """A peer that is not installed or does not take the case; the text says why."""


@dataclass(frozen=True)
class Cost:
    """What the floor is made of: every tensor read and written once, FLOPs of the algorithm."""

    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape of one preset."""

    op: str
    """public function"""
    name: str
    """which of its places in the model"""
    preset: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device], Inputs]
    """fresh random inputs, from torch's default generator"""
    call: Callable[[Inputs, str | None], Outputs]
    """the op with a backend"""
    plain: Call
    """an independent form in plain PyTorch: oracle and baseline"""
    leaves: tuple[str, ...] = ()
    """inputs that get gradients; none: forward only"""
    forward: Cost
    backward: Cost = Cost(0, 0)
    bitwise: frozenset[str] = frozenset()
    observe: Callable[[Inputs, dict[str, Tensor]], dict[str, Tensor]] | None = None
    """what the gate compares, when that is not the outputs themselves"""
    peers: Mapping[str, Call] = field(default_factory=dict)
    """best known other implementations"""
    gate_calls: int = 1
    """calls before the gate looks, for ops with state"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how carefully to measure."""

    device: torch.device
    rounds: int = 9
    turn_seconds: float = 0.05
    """least duration of one variant's turn"""
    budget_seconds: float = 6.0
    """of one variant in one direction; rounds shrink to fit, to 3 at least"""
    most_sets: int = 16
    """input sets rotated at most"""
    compile: bool = True
    seed: int = 1


def make_inputs(case: Case, settings: Settings, index: int) -> Inputs:
    """Input set number `index`, the same at every call; the case's leaves require gradients."""
    with torch.random.fork_rng(devices=[settings.device] if settings.device.type == "cuda" else []):
        torch.manual_seed(settings.seed + index)
        inputs = case.make(settings.device)
    return require_grad(case, inputs)


def require_grad(case: Case, inputs: Inputs) -> Inputs:
    return inputs | {name: inputs[name].detach().requires_grad_() for name in case.leaves}


def named(outputs: Outputs) -> dict[str, Tensor]:
    return {"out": outputs} if isinstance(outputs, Tensor) else dict(outputs)


def backward(
    case: Case, inputs: Inputs, outputs: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of the leaves, by name."""
    reached = {name: out for name, out in outputs.items() if out.requires_grad}
    grads = torch.autograd.grad(
        list(reached.values()),
        [inputs[name] for name in case.leaves],
        [gradients[name].to(out.dtype) for name, out in reached.items()],
    )
    return dict(zip(case.leaves, grads, strict=True))


def gradients_like(outputs: dict[str, Tensor], settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random gradients of the outputs, representable in the case's dtype; 1 for 0-dim outputs."""
    found = {}
    with torch.random.fork_rng(devices=[settings.device] if settings.device.type == "cuda" else []):
        torch.manual_seed(1000 + settings.seed)
        for name, out in outputs.items():
            if out.requires_grad:
                make = torch.randn if out.dim() else torch.ones
                gradient = make(out.shape, device=settings.device)
                found[name] = gradient.to(dtype if out.dim() else out.dtype)
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, d2vkern.MaskPlan):
        for item in dataclasses.fields(value):
            yield from tensors(getattr(value, item.name))


def map_floats(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to every floating tensor of nested dicts and lists."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: map_floats(item, change) for name, item in value.items()}
    return [map_floats(item, change) for item in value] if isinstance(value, list) else value
