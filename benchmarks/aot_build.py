"""Compile recorded launches for GPUs that are not here, and keep what was read from the result on disk.

Triton itself turns a launch's arguments into a signature, exactly as it would on the GPU: pointers that are
multiples of 16, integers that are, the integer 1 and None as constants. Meta tensors have address 0 plus
their offset, so views count as aligned as they are. Launches that come to the same build are compiled once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import aot_read
from benchmarks.aot_read import Resources, Traffic
from d2vkern.kernels._launch import MOST_STAGES_ON_AMD, Launch, most_stages

CACHE = Path(__file__).resolve().parents[1] / "build" / "aot"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Build:
    """One compilation; `constants` and `attributes` are keyed by Triton's paths to arguments."""

    module: str
    kernel: str
    source: str
    """hash of the kernel and of everything it calls"""
    target: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """By name: values of what is constant, types of the rest ("*bf16", "i32")."""
        named = dict(self.signature)
        names = list(named)
        return named | {names[path[0]]: value for path, value in self.constants}

    @property
    def label(self) -> str:
        """Kernel, dtypes of its pointers and compile-time values, for people."""
        pointers = "/".join(dict.fromkeys(kind[1:] for _, kind in self.signature if kind.startswith("*")))
        names = [name for name, _ in self.signature]
        values = ", ".join(f"{names[path[0]]}={value}" for path, value in self.constants)
        return f"{self.kernel} [{pointers}] ({values}; {self.num_warps} warps)"


def build_of(launch: Launch, target: str) -> Build:
    """The compilation that this launch would cause on `target`."""
    kernel = launch.kernel
    backend, binder = _binder(kernel, target)
    stages = launch.num_stages
    kind, architecture, _ = TARGETS[target]
    if kind == "hip":
        stages = min(stages, MOST_STAGES_ON_AMD)
    else:
        stages = most_stages(kernel, stages, divmod(int(architecture), 10))
    given = {
        **launch.constexprs,
        "num_warps": launch.num_warps,
        "num_stages": stages,
        "enable_fp_fusion": launch.fp_fusion,
    }
    bound, specialization, options = binder(*launch.args, **given)
    _, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, options)
    return Build(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        kernel.cache_key,
        target,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((path, tuple(map(tuple, hints))) for path, hints in attributes.items()),
        launch.num_warps,
        stages,
        launch.fp_fusion,
    )


@cache
def _binder(kernel: Any, target: str) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*TARGETS[target]))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def compile_all(builds: Iterable[Build], processes: int = 2) -> dict[Build, Resources | str]:
    """What each build needs, or the first line of why it does not compile."""
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(builds))
    found = {build: result for build in wanted if (result := _load(build)) is not None}
    missing = [build for build in wanted if build not in found]
    if len(missing) > 2 and processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            results: Sequence[Resources | str] = list(pool.map(compile_one, missing, chunksize=1))
    else:
        results = [compile_one(build) for build in missing]
    found.update(zip(missing, results, strict=True))
    return found


def compile_one(build: Build) -> Resources | str:
    """Compile and read; what was read is kept in `CACHE`, failures are not."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel: Any = importlib.import_module(build.module)
    for name in build.kernel.split("."):
        kernel = getattr(kernel, name)
    attributes = {path: [list(hint) for hint in hints] for path, hints in build.attributes}
    try:
        compiled = triton.compile(
            ASTSource(kernel, dict(build.signature), dict(build.constants), attributes),
            target=GPUTarget(*TARGETS[build.target]),
            options={
                "num_warps": build.num_warps,
                "num_stages": build.num_stages,
                "enable_fp_fusion": build.fp_fusion,
            },
        )
    except Exception as error:  # compilers fail in many ways, and each is a finding to report
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    if build.target.startswith("gfx"):
        found = aot_read.amd_resources(compiled.asm["amdgcn"])
    else:
        usage, sass = _disassemble(compiled.asm["cubin"])
        texts = compiled.asm["ptx"], compiled.asm["ttgir"]
        found = aot_read.resources(usage, sass, *texts, compiled.metadata.shared)
    _path(build).write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage, and SASS with the PTX lines it comes from, by the tools inside Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-gp", "-c"))
        usage, sass = (
            subprocess.run(
                [str(tools / tool), *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, *options in commands
        )
    return usage, sass


def _path(build: Build) -> Path:
    key = repr((build, _toolchain()))
    return CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@cache
def _toolchain() -> str:
    """What besides the build decides the result: Triton, and the reader."""
    import triton

    reader = Path(aot_read.__file__).read_bytes() + Path(__file__).read_bytes()
    return f"{triton.__version__} {hashlib.sha256(reader).hexdigest()}"


def _load(build: Build) -> Resources | None:
    path = _path(build)
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    traffic = {
        name: Traffic(entry["item"], [(b, lane, n) for b, lane, n in entry["blocks"]], entry["scalars"])
        for name, entry in known.pop("traffic").items()
    }
    assert known.keys() | {"traffic"} == {item.name for item in fields(Resources)}
    return Resources(**known, traffic=traffic)
