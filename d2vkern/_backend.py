"""Which implementation of an op runs, and why: one table and one decision for all eleven ops.

The decision is argument > ``with use_backend(...)`` > environment ``D2VKERN_BACKEND`` > auto. An explicit
request that cannot be met raises with every reason; auto goes by measured times where there are some for the
machine and the call (`_measured.py`), else by the order of the table, takes the first entry without a reason
against it and logs each such choice once, and why (logger ``d2vkern``).

`select` is traced by ``torch.compile(fullgraph=True)``. The context is a thread-local that Dynamo guards, so
compiled code follows ``use_backend`` (inside or around it) by recompiling; the environment and what the
machine offers are read while tracing and are constants of the compiled code.
"""

import difflib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2vkern import _check_mode, _context, _cpu, _derivatives, _measured, _native
from d2vkern._context import state
from d2vkern.peers import refusals

Function = TypeVar("Function", bound=Callable[..., Any])

ENVIRONMENT = "D2VKERN_BACKEND"
STEMS = (
    "masks",
    "gather",
    "attention",
    "conv_block",
    "conv_stem",
    "residual_norm",
    "mlp",
    "targets",
    "loss",
    "ema",
    "adamw_ema",
)
COMMON_BACKENDS = ("eager", "triton", "native")
LOW_PRECISION_STEMS = ("conv_block", "conv_stem")
"""ops whose Triton kernels auto chooses in 16 bits only: exact fp32 products have no matrix instructions"""
NATIVE_STEMS = ("masks", "gather", "ema", "adamw_ema")
"""ops with files in csrc/"""
PEERS = {"attention": ("sdpa", "flex", "xformers"), "mlp": ("onednn",), "conv_stem": ("onednn",)}
"""op -> backends that are other people's kernels"""

_logger = logging.getLogger("d2vkern")


class BackendError(ValueError):
    """A backend request that names nothing known, or that cannot be met here."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    module: import path of a module with the op's functions, whose arguments arrive checked.
    unsupported: given the call's tensors, and by name such other arguments as the op passes on, the reasons
        why this one cannot take the call (none: it can). It is traced by Dynamo, so of tensors it may look
        at dtypes, devices, shapes and requires_grad only.
    auto: device types on which auto may choose it unmeasured; None: on all.
    auto_dtypes: dtypes of the first tensor in which auto may choose it unmeasured; None: in all.
    auto_where: whether auto may choose it unmeasured on this machine; None: on all.
    limits: what it never does, whatever the machine, for `python -m d2vkern.info`.
    """

    module: str
    unsupported: Callable[..., list[str]] | None = None
    auto: tuple[str, ...] | None = None
    auto_dtypes: tuple[torch.dtype, ...] | None = None
    auto_where: Callable[[], bool] | None = None
    limits: str = ""


def _constant_while_tracing(function: Function) -> Function:
    """For what Dynamo cannot trace: it calls the function and takes the result as a constant.

    The mark is all that torch.compiler.assume_constant_result sets; calling that would import Dynamo, which
    takes seconds and imports triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_while_tracing
def _mkl_leaves_units_idle() -> bool:
    return _cpu.mkl_leaves_units_idle()


def _triton_gaps(*tensors: Tensor, **_: Any) -> list[str]:
    """Why Triton kernels cannot take these tensors. On meta tensors they compute nothing, as torch's ops."""
    reasons = []
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        reasons.append("fp64 tensors run on eager only")
    if any(tensor.device.type == "cpu" for tensor in tensors):
        if not _interpreted():
            reasons.append("CPU tensors need Triton's interpreter, TRITON_INTERPRET=1")
        elif any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            reasons.append("Triton's interpreter is wrong in bf16")
    return reasons


def _triton_attention_gaps(qkv: Tensor, **_: Any) -> list[str]:
    """The same for attention, whose kernels hold a head's whole width."""
    reasons = _triton_gaps(qkv)
    if qkv.shape[-1] > 128:
        reasons.append(f"head widths up to 128 only, got {qkv.shape[-1]}")
    return reasons


def _native_gaps(*tensors: Tensor, **_: Any) -> list[str]:
    """Why the compiled extension cannot take these tensors."""
    reasons = []
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        reasons.append("fp64 tensors run on eager only")
    for device in {tensor.device for tensor in tensors}:
        reason = ""
        if device.type == "cuda":
            reason = _cuda_problem(device.index)
        elif device.type != "cpu":
            reason = f"the compiled extension runs on CPU and CUDA tensors, not on {device.type}"
        if reason:
            reasons.append(reason)
    return reasons


def _table(stem: str) -> dict[str, Implementation]:
    """Backend -> implementation, in auto's order of preference; eager takes everything, so what stands after
    it runs on request only. On CUDA auto leaves the compiled one alone: Triton's gather was faster on an
    H200, and the other ops have not been measured."""
    table = {}
    if stem in NATIVE_STEMS:
        table["native"] = Implementation(f"d2vkern.native.{stem}", _native_gaps, auto=("cpu",))
    unsupported = _triton_attention_gaps if stem == "attention" else _triton_gaps
    dtypes = (torch.float16, torch.bfloat16) if stem in LOW_PRECISION_STEMS else None
    table["triton"] = Implementation(f"d2vkern.kernels.{stem}", unsupported, ("cuda",), dtypes)
    if "onednn" in PEERS.get(stem, ()):
        table["onednn"] = _peer(stem, "onednn", auto=("cpu",), auto_where=_mkl_leaves_units_idle)
    table["eager"] = Implementation(f"d2vkern.reference.{stem}")
    for name in PEERS.get(stem, ()):
        if name not in table:
            table[name] = _peer(stem, name, auto=())
    return table


def _peer(stem: str, name: str, **auto: Any) -> Implementation:
    return Implementation(
        f"d2vkern.peers.{stem}_{name}", getattr(refusals, name), limits=refusals.LIMITS[name], **auto
    )


REGISTRY: dict[str, dict[str, Implementation]] = {stem: _table(stem) for stem in STEMS}


_announced: set[str] = set()


def backend_names(stem: str) -> tuple[str, ...]:
    """The backend names that may be requested for an op, built or not."""
    return COMMON_BACKENDS + PEERS.get(stem, ())


def select(stem: str, backend: str | None, *tensors: Tensor, **call: Any) -> ModuleType:
    """The module that implements op `stem` for a call with these tensors.

    backend: the public function's `backend` argument; None leaves it to context, environment and auto.
    call: further arguments of the call that decide which implementations can take it.
    Raises BackendError (a ValueError) for an unknown name and for a request that cannot be met,
    NotImplementedError where no backend can run (`_derivatives.check_supported`).
    """
    if not torch.compiler.is_compiling():
        _derivatives.check_supported(stem)
    requested, spies = _context.current()
    name, origin = _request(stem, backend, requested)
    if name is None:
        if state.reentrant and not torch.compiler.is_compiling():
            # the first run wants no gradients, the second does, and both must be the same
            with torch.enable_grad():
                name = _choose(stem, tuple(map(_wanting, tensors)), {k: _wanting(v) for k, v in call.items()})
        else:
            name = _choose(stem, tensors, call)
    else:
        reasons = gaps(stem, name, *tensors, **call)
        if reasons:
            raise BackendError(
                f"{stem}: backend {name!r}, requested by {origin}, cannot run: {'; '.join(reasons)}. "
                f"Available here: {', '.join(_available(stem, tensors, call))}"
            )
    for calls in spies:
        calls.append((stem, name))
    path = REGISTRY[stem][name].module
    _import(path, torch.compiler.is_compiling())
    if _check_mode.enabled and name != "eager" and not torch.compiler.is_compiling():
        eager = REGISTRY[stem]["eager"].module
        _import(eager)
        return _check_mode.checked(stem, name, sys.modules[path], sys.modules[eager])
    return sys.modules[path]


@contextmanager
def use_backend(default: str | None = None, **per_op: str) -> Iterator[None]:
    """Request backends for this thread's calls in the block: ``use_backend("eager", attention="triton")``.

    default: backend for all ops; None leaves the ops not named in `per_op` as they are.
    per_op: backend for one op, by stem (``masks``, ``gather``, ``attention``, ...).
    Blocks nest, the inner one wins. The choice is made in the forward pass; a backward pass outside the block
    runs on the backend of its forward, and so does what torch.utils.checkpoint runs again there. Raises
    BackendError for an unknown backend or op.
    """
    outer, _ = _context.current()
    with _context.request({**outer, **_expand(default, per_op, "use_backend")}):
        yield


def gaps(stem: str, backend: str, *tensors: Tensor, **call: Any) -> list[str]:
    """Every reason why `backend` cannot run op `stem` here (this call of it, if given); none: it can."""
    implementation = REGISTRY[stem].get(backend)
    if implementation is None:
        # of an op that has none it says nothing whether the extension is there
        return ["not built yet in this version", *(() if backend == "native" else _machine_gaps(backend))]
    reasons = list(_machine_gaps(backend))
    if tensors and implementation.unsupported is not None:
        reasons += implementation.unsupported(*tensors, **call)
    return reasons


def _request(stem: str, backend: str | None, requested: dict[str, str]) -> tuple[str | None, str]:
    if backend is not None:
        _check_backend(stem, backend, "argument backend")
        return backend, "argument backend"
    if stem in requested:
        return requested[stem], "context use_backend"
    if _context.is_lost():
        raise BackendError(
            f"{stem}: called in backward, where this torch's checkpointing does not say which backend its "
            "forward had: checkpoint keep_backend(function), or pass backend="
        )
    return _from_environment(stem), f"environment {ENVIRONMENT}"


def _choose(stem: str, tensors: tuple[Tensor, ...], call: dict[str, Any]) -> str:
    if torch.compiler.is_exporting():  # a program of torch's operators alone, which runs without d2vkern
        return "eager"
    names = [name for name, one in REGISTRY[stem].items() if _is_automatic(one, tensors)]
    measured = None if torch.compiler.is_compiling() else _measured.order(stem, tensors, call)
    where, fastest = measured or ("", [])
    for name in fastest:
        _check_backend(stem, name, f"{_measured.TABLE.name}, {where}")
    for name in [*fastest, *names]:
        if not gaps(stem, name, *tensors, **call):
            _announce(stem, name, f"measured: {where}" if name in fastest else "not measured")
            return name
    raise AssertionError(f"{stem}: no implementation takes the call, not even eager")


def _wanting(value: Any) -> Any:
    """A floating tensor as one that wants a gradient; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value


def _is_automatic(one: Implementation, tensors: tuple[Tensor, ...]) -> bool:
    device = tensors[0].device.type if tensors else "cpu"
    if one.auto is not None and device not in one.auto:
        return False
    if one.auto_where is not None and not one.auto_where():
        return False
    return one.auto_dtypes is None or not tensors or tensors[0].dtype in one.auto_dtypes


def _available(stem: str, tensors: tuple[Tensor, ...], call: dict[str, Any]) -> list[str]:
    return [name for name in REGISTRY[stem] if not gaps(stem, name, *tensors, **call)]


def _expand(default: str | None, per_op: dict[str, str], origin: str) -> dict[str, str]:
    """Turn 'this for all, that for one' into stem -> backend."""
    requested = {}
    if default is not None:
        owners = [stem for stem, names in PEERS.items() if default in names]
        if owners:
            raise BackendError(
                f"{origin}: {default!r} is a backend of {' and '.join(owners)} only, "
                f"write {owners[0]}={default}"
            )
        for stem in STEMS:
            _check_backend(stem, default, origin)
            requested[stem] = default
    for stem, backend in per_op.items():
        if stem not in STEMS:
            raise BackendError(
                f"{origin}: unknown op {stem!r}{_nearest(stem, STEMS)}; ops: {', '.join(STEMS)}"
            )
        _check_backend(stem, backend, origin)
        requested[stem] = backend
    return requested


def _check_backend(stem: str, backend: str, origin: str) -> None:
    names = backend_names(stem)
    if backend not in names:
        raise BackendError(
            f"{stem}: unknown backend {backend!r} in {origin}{_nearest(backend, names)}; "
            f"backends of {stem}: {', '.join(names)}"
        )


@cache
def _parse_environment(value: str) -> dict[str, str]:
    """'eager,attention=triton' -> stem -> backend."""
    default: str | None = None
    per_op = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        stem, equals, backend = (word.strip() for word in part.partition("="))
        if equals:
            per_op[stem] = backend
        elif default is not None:
            raise BackendError(
                f"environment {ENVIRONMENT}: two backends for all ops, {default!r} and {part!r}"
            )
        else:
            default = part
    return _expand(default, per_op, f"environment {ENVIRONMENT}")


@_constant_while_tracing
def _from_environment(stem: str) -> str | None:
    return _parse_environment(os.environ.get(ENVIRONMENT, "")).get(stem)


@_constant_while_tracing
def _nearest(word: Any, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


@_constant_while_tracing
def _machine_gaps(backend: str) -> tuple[str, ...]:
    """What this machine lacks for a backend, whatever the op."""
    reasons = []
    if backend in ("triton", "xformers"):
        if importlib.util.find_spec(backend) is None:
            reasons.append(f"{backend} is not installed")
        if not torch.cuda.is_available() and not (backend == "triton" and _interpreted()):
            reasons.append("no CUDA device")
        elif backend == "xformers" and not reasons and not _xformers_loads():
            reasons.append("its kernels do not load beside this torch: python -m xformers.info")
    if backend == "onednn" and not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        reasons.append("this torch is built without oneDNN's linear layer")
    if backend == "native" and _native.problem():
        reasons.append(_native.problem())
    return tuple(reasons)


def _xformers_loads() -> bool:
    """A build for another torch can be imported, and then has no kernels."""
    return bool(getattr(importlib.import_module("xformers"), "_has_cpp_library", True))


@_constant_while_tracing
def _cuda_problem(index: int | None) -> str:
    return _native.cuda_problem(index)


@_constant_while_tracing
def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors; Triton reads this when imported."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


@_constant_while_tracing
def _announce(stem: str, name: str, why: str) -> None:
    choice = f"{stem}: auto chose backend {name} ({why})"
    if choice not in _announced:
        _announced.add(choice)
        _logger.info(choice)


@_constant_while_tracing
def _import(path: str, tracing: bool = False) -> None:
    """tracing: import what any op could ask for, since Dynamo looks at sys.modules once per trace."""
    if path not in sys.modules:
        importlib.import_module(path)
    if tracing:
        for table in REGISTRY.values():
            for name, implementation in table.items():
                if implementation.module not in sys.modules and not _machine_gaps(name):
                    importlib.import_module(implementation.module)
