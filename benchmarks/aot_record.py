"""Run the ops on meta tensors of the presets' shapes and write down which kernels they would start."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.aot_trace import OpTrace
from benchmarks.cases import Case, Settings, backward, gradients_like, named, require_grad
from benchmarks.shapes import shapes
from d2vkern import _backend
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.kernels import _table, _tuning
from d2vkern.kernels._launch import Launch, record_launches
from d2vkern.kernels._tuning import forced, record_choices

META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPUS = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100", "MI300": "gfx942"}
"""word of a GPU's name -> the target that what was measured on it is for"""


@dataclass(frozen=True)
class Record:
    """One direction of one case on the triton backend."""

    stem: str
    case: Case
    direction: str
    """"forward" or "backward\""""
    launches: list[Launch]
    library: OpTrace
    """PyTorch's own operators around the launches"""
    tables: list[tuple[Tensor, Tensor]]
    """pointer tables of the launches, on the device and on the host"""
    floor: int
    """bytes that the op's formula counts (d2vkern/_costs.py)"""
    calls: int
    """of the op's implementation"""
    flops: int
    """of the algorithm, by the same formula"""
    targets: tuple[str, ...] = ()
    """where it runs; none: everywhere"""

    def arguments(self, launch: Launch) -> dict[str, Any]:
        """`arguments` of one of the launches; with "shapes" of its preset and, where it has a pointer table,
        that as "table", on the host."""
        named = arguments(launch) | {"shapes": shapes(self.case.preset, "gpu")}
        for data, staged in self.tables:
            if any(value is data for value in launch.args):
                named["table"] = staged
        return named


def triton_stems() -> list[str]:
    """The ops that have a Triton backend."""
    return [stem for stem, backends in _backend.REGISTRY.items() if "triton" in backends]


def cases_of(
    stems: Iterable[str], presets: Iterable[str], dtypes: Iterable[str]
) -> Iterator[tuple[str, Case]]:
    """(stem, case) at GPU batches; a case that two precisions share comes once."""
    seen = set()
    for stem in stems:
        bench = importlib.import_module(f"benchmarks.bench_{stem}")
        for preset in presets:
            for dtype in dtypes:
                for case in bench.cases(preset, "gpu", DTYPES[dtype]):
                    key = (stem, case.op, case.name, case.preset, case.dtype)
                    if key not in seen:
                        seen.add(key)
                        yield stem, case


def record(stem: str, case: Case) -> list[Record]:
    """Forward, and backward where there is one, of a second call: what only the first does is left out."""
    with as_on_a_gpu():
        inputs = require_grad(case, case.make(META))
        with record_launches():
            case.call(inputs, "triton")
        outputs: dict[str, Tensor] = {}

        def forward() -> None:
            outputs.update(named(case.call(inputs, "triton")))

        found = [_record(stem, case, "forward", forward)]
        if case.leaves:
            gradients = gradients_like(outputs, Settings(device=META), case.dtype)
            found.append(_record(stem, case, "backward", lambda: backward(case, inputs, outputs, gradients)))
    return found


def _record(stem: str, case: Case, direction: str, run: Callable[[], object]) -> Record:
    with (
        record_launches() as launches,
        OpTrace("meta") as library,
        force_ranges(True),
        tally_costs() as costs,
    ):
        run()
    tables = [(table.data, table.staged) for table in _table.tables.values()]
    ours = [tally for name, tally in costs.items() if name.endswith("/triton")]
    floor, calls = sum(tally.bytes for tally in ours), sum(tally.calls for tally in ours)
    flops = sum(tally.flops for tally in ours)
    return Record(stem, case, direction, launches, library, tables, floor, calls, flops)


def kernels_of(stems: Iterable[str]) -> set[str]:
    """Names of all kernels in the files of these ops, and in the shared ones."""
    found = set()
    for path in sorted(_tuning.TABLE.parent.glob("*.py")):
        if path.stem.startswith("_") or path.stem.removesuffix("_fwd").removesuffix("_bwd") in stems:
            module = importlib.import_module(f"d2vkern.kernels.{path.stem}")
            for name, value in vars(module).items():
                owner = getattr(getattr(value, "fn", None), "__module__", "")
                if "_kernel" in name and owner == module.__name__:
                    found.add(name)
    return found


def record_candidates(stem: str, case: Case) -> list[Record]:
    """`record` once for every configuration that is not the default."""
    with record_choices() as asked:
        record(stem, case)
    found = []
    for (kernel, bucket), candidates in asked.items():
        for config in candidates[1:]:
            with forced(kernel, bucket, config):
                found += record(stem, case)
    return found


def record_tuned(stem: str, case: Case) -> list[Record]:
    """`record` with the configurations measured on each GPU of kernels/tuned.json."""
    found = []
    for gpu in _tuning.read_table():
        targets = tuple(target for word, target in GPUS.items() if word in gpu)
        with mock.patch.object(_tuning, "_gpu", lambda gpu=gpu: gpu):
            found += [replace(one, targets=targets) for one in record(stem, case)]
    return found


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let `backend="triton"` be asked for where there is neither GPU nor interpreter: nothing will run."""
    with mock.patch.object(_backend, "_machine_gaps", lambda backend: ()):
        yield


def arguments(launch: Launch) -> dict[str, Any]:
    """All arguments of a launch by the kernel's names, and its number of programs as "programs"."""
    names = [parameter.name for parameter in launch.kernel.params]
    runtime = [name for name in names if name not in launch.constexprs]
    named = dict(zip(runtime, launch.args, strict=False)) | launch.constexprs
    return {"programs": math.prod(launch.grid), **named}


def vector_bytes(tensor: Tensor) -> int:
    """The widest access, in bytes and up to 16, that never straddles a row: what a kernel could use.

    Elements next to each other in memory along the last dimension, rows and their starts at multiples.
    """
    item = tensor.element_size()
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    if not dims:
        return item
    (length, step), outer = dims[-1], dims[:-1]
    if step != 1:
        return item
    return math.gcd(16, length * item, tensor.storage_offset() * item, *(s * item for _, s in outer))
