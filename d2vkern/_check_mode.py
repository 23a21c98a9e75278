"""`D2VKERN_CHECK=1`: every call of another backend also runs eager, and disagreement raises BackendMismatch.

A call runs three times: on the chosen backend, on eager with the same arguments, and on eager in fp64, which
says how far off both may be. An output agrees when its error against fp64 is at most four times eager's plus
four roundings of its dtype, in the largest and in the root-mean-square value (the largest errors of two
equally good orders of summation differ by more than two); integers and bools agree when they are equal.
Gradients are compared alike when autograd asks for them, for the gradient that arrived. Of ops that work in
place, eager gets copies of what it may change, and what the op writes is compared.

Dropout without a seed gets one, drawn from torch's default generator, so that both sides drop the same
elements. A call that draws from torch's generators all the same is not compared, nor is one that is captured
in a CUDA graph; logger "d2vkern" says so. Under torch.compile checks are off. The eager runs take their
memory and time, and the host waits for them; unset, the mode costs a call one flag check.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

ENVIRONMENT = "D2VKERN_CHECK"
FACTOR = 4.0
ROUNDINGS = 4.0
FEW = 1024
"""values below which an error may come to four times as many roundings"""
# What in-place functions write, by parameter: gradients, for one, may stay scaled on some backends.
WRITTEN = {
    "ema_update_": ("teacher", "copies"),
    "adamw_ema_": ("params", "exp_avgs", "exp_avg_sqs", "teachers", "copies", "teacher_copies"),
    "accumulate": ("accumulator",),
    "finish": ("accumulator",),
}
_DROPOUTS = ("dropout_p", "drop_path_p")

_logger = logging.getLogger("d2vkern")


class BackendMismatch(RuntimeError):
    """A backend's result is not eager's."""


def requested(environment: Mapping[str, str]) -> bool:
    """Whether calls are checked. Raises ValueError for a D2VKERN_CHECK that is neither 0 nor 1."""
    value = environment.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"environment {ENVIRONMENT}: must be 0 or 1, got {value!r}")
    return value == "1"


enabled = requested(os.environ)


@contextmanager
def force_checks(on: bool) -> Iterator[None]:
    """Checks on or off in the block, whatever the environment says."""
    global enabled
    outer, enabled = enabled, on
    try:
        yield
    finally:
        enabled = outer


def checked(stem: str, backend: str, module: ModuleType, eager: ModuleType) -> ModuleType:
    """A module whose functions are those of `module`, each held against the one of `eager`."""
    view = ModuleType(f"{module.__name__} beside eager")

    def function(name: str) -> Callable[..., Any]:
        ours, reference = getattr(module, name), getattr(eager, name)

        def beside_eager(*args: Any, **kwargs: Any) -> Any:
            return _Call(stem, backend, name, ours, reference).run(args, kwargs)

        return beside_eager

    view.__getattr__ = function  # type: ignore[method-assign]
    return view


class _Call:
    """One call on a backend and, beside it, on eager."""

    def __init__(
        self, stem: str, backend: str, name: str, ours: Callable[..., Any], eager: Callable[..., Any]
    ) -> None:
        self.stem, self.backend, self.name, self.ours, self.eager = stem, backend, name, ours, eager

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(self.eager).bind(*args, **kwargs)
        bound.apply_defaults()
        given = _seeded(dict(bound.arguments))
        if any(tensor.is_meta for tensor in _tensors(given)):
            return self._call(self.ours, bound, given)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._log("is being captured in a CUDA graph, where nothing can be read,")
            return self._call(self.ours, bound, given)
        # Eager runs first, as the op may write to what it is given.
        in_place = self.name in WRITTEN
        same, exact = _copies(given, None, in_place), _copies(given, torch.float64, in_place)
        devices = sorted({t.device for t in _tensors(given) if t.is_cuda}, key=str)
        with torch.random.fork_rng(devices=[device.index for device in devices]), _plain_saving():
            expected, truth = (self._call(self.eager, bound, arguments) for arguments in (same, exact))
        taps = _Taps(self, given)
        generators = _generators(devices)
        outputs = self._call(self.ours, bound, taps.enter(given))
        if _differ(generators, _generators(devices)):
            self._log("drew from torch's generators")
            taps.off = True
            return outputs
        ours = _named(outputs, self._written(given))
        theirs, exactly = _named(expected, self._written(same)), _named(truth, self._written(exact))
        for key, actual in ours.items():
            self.compare(f"output {key}", actual, theirs[key], exactly[key])
        taps.watch(ours, (theirs, same), (exactly, exact))
        return outputs

    def _call(
        self, function: Callable[..., Any], bound: inspect.BoundArguments, given: dict[str, Any]
    ) -> Any:
        again = inspect.BoundArguments(bound.signature, OrderedDict(given))
        return function(*again.args, **again.kwargs)

    def _log(self, why: str) -> None:
        _logger.warning(
            "%s: %s on backend %s %s and was not compared with eager", self.stem, self.name, self.backend, why
        )

    def _written(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in WRITTEN.get(self.name, ())}

    def where(self, what: str) -> str:
        return f"{self.stem}: {self.name} on backend {self.backend}, {what}"

    def compare(self, what: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
        """Raise BackendMismatch unless `actual` is about as close to `exact` as eager is."""
        where = self.where(what)
        if (actual.shape, actual.dtype) != (eager.shape, eager.dtype):
            raise BackendMismatch(
                f"{where}: is {actual.dtype} {tuple(actual.shape)}, "
                f"eager's is {eager.dtype} {tuple(eager.shape)}"
            )
        if actual.numel() == 0:
            return
        about = f"shape {tuple(actual.shape)}, {actual.dtype}"
        if not actual.is_floating_point():
            wrong = actual != eager
            if wrong.any():
                raise BackendMismatch(f"{where}: {int(wrong.sum())} values differ from eager's; {about}")
            return
        ours, theirs, truth = (x.detach().double() for x in (actual, eager, exact))
        odd = ~theirs.isfinite()
        alike = torch.equal(ours[odd].nan_to_num(nan=0.0), theirs[odd].nan_to_num(nan=0.0))
        if not alike or not torch.equal(ours.isnan(), theirs.isnan()):
            raise BackendMismatch(f"{where}: differs from eager where values are not finite; {about}")
        ours, theirs, truth = ours[~odd], theirs[~odd], truth[~odd]
        if ours.numel() == 0:
            return
        # In few values eager may be right by luck.
        roundings = ROUNDINGS if ours.numel() >= FEW else 4 * ROUNDINGS
        rounding = roundings * torch.finfo(actual.dtype).eps
        for norm in (_largest, _rms):
            error, bound = norm(ours - truth), FACTOR * norm(theirs - truth) + rounding * norm(truth)
            if not error <= bound:
                raise BackendMismatch(
                    f"{where}: {norm.__name__.strip('_')} error {error:.3e}, tolerance {bound:.3e}; {about}"
                )


class _Taps:
    """The gradients that enter and leave one call, and eager's for the same ones."""

    def __init__(self, call: _Call, given: dict[str, Any]) -> None:
        self.call, self.off = call, False
        self.wanted = [n for n, value in given.items() if isinstance(value, Tensor) and value.requires_grad]
        self.incoming: dict[str, Tensor] = {}
        self.runs: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def enter(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments with views in the place of those that want a gradient."""
        if not torch.is_grad_enabled() or not self.wanted or self.call.name in WRITTEN:
            return given
        views = _Tap.apply(self, *(given[name] for name in self.wanted))
        return given | dict(zip(self.wanted, views, strict=True))

    def watch(self, outputs: dict[str, Tensor], *runs: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Take the outputs' gradients; runs: eager's outputs and inputs, in the same dtypes and in fp64."""
        self.runs = list(runs)
        for name, out in outputs.items():
            has, should = out.requires_grad, runs[0][0][name].requires_grad
            if has != should:
                words = "no gradient", "a gradient"
                raise BackendMismatch(
                    f"{self.call.where(f'output {name}')}: has {words[has]}, eager's has {words[should]}"
                )
            if has:
                out.register_hook(functools.partial(self.incoming.__setitem__, name))

    def compare(self, gradients: Sequence[Tensor | None]) -> None:
        """Hold the gradients that leave the op against eager's."""
        if self.off:
            return
        incoming = dict(self.incoming)
        self.incoming.clear()
        found = []
        for outputs, inputs in self.runs:
            found.append(
                torch.autograd.grad(
                    [outputs[name] for name in incoming],
                    [inputs[name] for name in self.wanted],
                    [gradient.to(outputs[name].dtype) for name, gradient in incoming.items()],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        for name, *three in zip(self.wanted, gradients, *found, strict=True):
            shape = self.runs[0][1][name]
            zero = torch.zeros_like(shape)
            self.call.compare(f"gradient of {name}", *(zero if g is None else g for g in three))


class _Tap(torch.autograd.Function):
    """Views of the inputs, whose gradients all pass here on their way out."""

    @staticmethod
    def forward(ctx: Any, taps: _Taps, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.taps = taps
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        ctx.taps.compare(gradients)
        return None, *gradients


def _seeded(given: dict[str, Any]) -> dict[str, Any]:
    """The same call, with a seed where it would draw one."""
    drops = any(given.get(name) for name in _DROPOUTS)
    if drops and "seed" in given and given["seed"] is None:
        return given | {"seed": int(torch.randint(2**62, ()))}
    return given


def _copies(given: dict[str, Any], upcast: torch.dtype | None, clone: bool) -> dict[str, Any]:
    """Arguments for eager, outside of the caller's graph; of clones, a tensor that comes twice has one."""
    known: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known or not clone:
            plain = value.detach()
            if upcast is not None and plain.is_floating_point():
                plain = plain.to(upcast)
            plain = plain.clone() if clone else plain
            known[id(value)] = plain.requires_grad_(value.requires_grad)
        return known[id(value)]

    return tree_map(copy, given)


def _named(outputs: Any, written: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name: outputs by number, what was written by parameter."""
    found: dict[str, Tensor] = {}
    parts = {"": outputs, **written}
    for part, value in parts.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        for i, item in enumerate(items):
            if isinstance(item, Tensor):
                found[f"{part}[{i}]" if part else str(i)] = item
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _generators(devices: Sequence[torch.device]) -> list[Tensor]:
    """States of torch's default generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))


def _plain_saving() -> Any:
    """What eager saves for backward is kept as it is, even where checkpointing would throw it away."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _largest(error: Tensor) -> float:
    return error.abs().max().item()


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()
