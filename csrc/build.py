"""Builds d2vkern/_C.so from the sources beside this file; run by setup.py, and torch need not be imported.

What is built is what this machine can: CUDA kernels with nvcc, else the CPU's with a C++ compiler, else
nothing, and one line says which and why. Only an explicit wish (D2VKERN_BUILD_CUDA=1, FORCE_CUDA=1) can fail
a build.

The library stands on PyTorch's stable ABI at target 2.10: it is compiled with torch's headers (of any torch
from 2.10 on, found by path) and without Python's, so one file serves every CPython and every torch from 2.10
on. It exports nothing. It must name libtorch.so as needed: that brings libtorch_cuda.so in on a CUDA build.

Environment: D2VKERN_BUILD_CUDA = auto (default) | 0 | 1, FORCE_CUDA = 1 (as D2VKERN_BUILD_CUDA=1), CUDA_HOME,
TORCH_CUDA_ARCH_LIST (as torch takes it: "8.0;9.0a;10.0+PTX", "7.5 8.0", "Hopper", "native"; what cannot be
built of it is left out and named), MAX_JOBS, CXX, D2VKERN_BUILD_CPU = 0 (nothing is compiled), D2VKERN_DEBUG
= 1 (line numbers for debuggers and profilers), D2VKERN_BUILD_DIR (where finished work is kept, build/native
by default: the same sources and flags are not compiled again).
"""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("d2vkern_architectures", SOURCES / "architectures.py")
assert _spec is not None and _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

CPU_SOURCES = ("ops.cpp", "ema.cpp", "adamw_ema.cpp", "grad_norm.cpp", "masks.cpp", "gather.cpp")
OLDEST_TORCH = (2, 10)
OLDEST_CUDA = (12, 8)
"""the first that knows sm_100"""
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-fno-gnu-unique,-ffp-contract=off",
]


class BuildError(RuntimeError):
    """An explicit wish that cannot be met, or a library that is not as it must be."""


@dataclass(frozen=True)
class Plan:
    """What to compile, with what, and why not more."""

    compiler: str | None
    torch: Path | None
    """torch's package folder"""
    nvcc: Path | None
    architectures: tuple[tuple[int, str], ...] = ()
    """(capability * 10, "", "a", "+PTX" or "a+PTX")"""
    jobs: int = 1
    ninja: str | None = None
    debug: bool = False
    must_have_cuda: bool = False
    why: tuple[str, ...] = ()
    """why something is left out"""

    @property
    def parts(self) -> tuple[str, ...]:
        """ "cpu" and "cuda", what of them is wanted."""
        if self.compiler is None or self.torch is None:
            return ()
        return ("cpu",) if self.nvcc is None else ("cpu", "cuda")


def plan(environment: Mapping[str, str], torch: Path | None, sources: Path = SOURCES) -> Plan:
    """Decide from the environment, what is on its PATH, and torch's package folder (None: there is none).

    Raises BuildError for a setting out of range and for CUDA that is asked for but cannot be built.
    """
    wish = environment.get("D2VKERN_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise BuildError(f"D2VKERN_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    must = wish == "1" or (wish == "auto" and environment.get("FORCE_CUDA", "0") == "1")
    why: list[str] = []

    def give_up(reason: str) -> Plan:
        if must:
            raise BuildError(f"CUDA kernels were asked for, but {reason}")
        return Plan(None, None, None, why=(reason,))

    if environment.get("D2VKERN_BUILD_CPU", "1") == "0":
        return give_up("D2VKERN_BUILD_CPU=0")
    if sys.platform != "linux":
        return give_up(f"nothing is compiled on {sys.platform}")
    compiler = _which(environment.get("CXX") or "g++", environment) or _which("c++", environment)
    if compiler is None:
        return give_up("there is no C++ compiler")
    if torch is None or not (torch / "include/torch/csrc/stable/library.h").is_file():
        return give_up(
            "torch's headers are not in this environment (pip install torch, then --no-build-isolation)"
        )
    if _torch_version(torch) < OLDEST_TORCH:
        return give_up(f"torch's headers are older than {_dotted(OLDEST_TORCH)}")
    nvcc = None
    if wish == "0":
        why.append("no CUDA kernels: D2VKERN_BUILD_CUDA=0")
    else:
        nvcc, reason = _find_nvcc(environment)
        if nvcc is not None and not list(sources.glob("*.cu")):
            nvcc, reason = None, "there are no CUDA sources"
        chosen: tuple[tuple[int, str], ...] = ()
        if nvcc is not None:
            text = environment.get("TORCH_CUDA_ARCH_LIST", "")
            chosen, left_out = architectures.read(text, nvcc, environment)
            if not chosen:
                nvcc, reason = None, f"TORCH_CUDA_ARCH_LIST leaves nothing to build: {'; '.join(left_out)}"
            elif left_out:
                why.append(f"left out of TORCH_CUDA_ARCH_LIST: {'; '.join(left_out)}")
        if reason and must:
            raise BuildError(f"CUDA kernels were asked for, but {reason}")
        if reason:
            why.append(f"no CUDA kernels: {reason}")
    return Plan(
        compiler,
        torch,
        nvcc,
        chosen if nvcc else (),
        _jobs(environment),
        _which("ninja", environment),
        environment.get("D2VKERN_DEBUG", "0") == "1",
        must,
        tuple(why),
    )


def find_torch() -> Path | None:
    """The folder of the torch package of the environment that is installed into, not imported.

    In an isolated build that is not the environment the build runs in, but the interpreter is the same.
    """
    folders = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parents[1])
    for folder in folders:
        if (folder / "torch" / "version.py").is_file():
            return folder / "torch"
    return None


def build(version: str, target: Path, work: Path, environment: Mapping[str, str], torch: Path | None) -> str:
    """Compile what can be into `target` and return the line that says what that was. Finished work is kept.

    work: folder for objects. Without anything compiled a `target` of before is removed.
    Raises BuildError when CUDA was asked for and does not come about.
    """
    wanted = plan(environment, torch)
    why = list(wanted.why)
    built: tuple[str, ...] = ()
    for attempt in dict.fromkeys((wanted.parts, wanted.parts[:1])):
        if not attempt:
            break
        try:
            _compile(wanted, attempt, version, target, work, environment)
        except (BuildError, OSError) as error:
            if "cuda" in attempt and wanted.must_have_cuda:
                raise
            what = "CUDA kernels" if "cuda" in attempt else "compiled extension"
            why.append(f"no {what}: {error}")
            continue
        built = attempt
        break
    if not built:
        target.unlink(missing_ok=True)
    names = {"cpu": "CPU kernels", "cuda": f"CUDA kernels ({architectures.names(wanted.architectures)})"}
    said = " and ".join(names[part] for part in built) or "pure Python, eager and Triton only"
    return f"d2vkern: built {said}" + (f"; {'; '.join(why)}" if why else "")


def _compile(
    wanted: Plan,
    parts: tuple[str, ...],
    version: str,
    target: Path,
    work: Path,
    environment: Mapping[str, str],
) -> None:
    """One library of all parts; BuildError with the compiler's words when that fails."""
    assert wanted.compiler is not None and wanted.torch is not None
    cuda = "cuda" in parts
    sources = [SOURCES / name for name in CPU_SOURCES]
    sources += sorted(SOURCES.glob("*.cu")) if cuda else []
    defines = [
        f'-DD2V_VERSION="{version}"',
        f"-DD2V_VERSION_NUMBERS={','.join(re.findall(r'[0-9]+', version)[:3])}",
    ]
    if cuda:
        defines += [
            "-DD2V_WITH_CUDA",
            f"-DD2V_CUDA_ARCHITECTURES={','.join(map(str, architectures.codes_of(wanted.architectures)))}",
        ]
    # torch's as system headers: their warnings are not ours
    includes = [f"-I{SOURCES}", "-isystem", str(wanted.torch / "include")]
    debug = ["-g"] if wanted.debug else []
    cxx = [*shlex.split(wanted.compiler), *CXX_FLAGS, *debug, *defines, *includes]
    host = ["-ccbin", shlex.split(wanted.compiler)[0]]
    # no defines: nvcc takes a comma in one for the next
    nvcc = [str(wanted.nvcc), *host, *NVCC_FLAGS, *architectures.gencode(wanted.architectures), *includes]
    nvcc += ["-lineinfo"] if wanted.debug else []
    shared = [
        f"--version-script={SOURCES / 'exports.map'}",
        "--no-as-needed",
        f"-L{wanted.torch / 'lib'}",
        "-l:libtorch.so",
        *([] if wanted.debug else ["--strip-all"]),
    ]
    if cuda:
        linker = [str(wanted.nvcc), *host, "-shared", "-cudart", "static"]
    else:
        linker = [*shlex.split(wanted.compiler), "-shared"]
    shared = [word for flag in shared for word in ("-Xlinker", flag)]
    flags = json.dumps([cxx, nvcc if cuda else [], linker, shared])
    stamp = hashlib.sha256(flags.replace(str(SOURCES), "csrc").encode())
    for path in sorted(SOURCES.glob("*.*")):
        stamp.update(path.read_bytes())
    folder = work / f"{'-'.join(parts)}-{stamp.hexdigest()[:16]}"
    product = folder / "_C.so"
    if not product.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{source.name}.o" for source in sources]
        commands = [
            ([*(nvcc if source.suffix == ".cu" else cxx), "-c", str(source), "-o", str(into)], into)
            for source, into in zip(sources, objects, strict=True)
        ]
        unfinished = folder / "unfinished.so"
        _run_all(commands, wanted, folder, environment)
        _run([*linker, *map(str, objects), *shared, "-o", str(unfinished)], environment)
        if "libtorch.so" not in needed(unfinished):
            raise BuildError(
                f"the linker left libtorch.so out of what the library needs: {needed(unfinished)}"
            )
        unfinished.rename(product)
    target.parent.mkdir(parents=True, exist_ok=True)
    # a new file: whoever has the old one loaded keeps it
    fresh = target.with_name(f"{target.name}.new")
    shutil.copyfile(product, fresh)
    fresh.replace(target)


def _run_all(
    commands: Sequence[tuple[list[str], Path]], wanted: Plan, folder: Path, environment: Mapping[str, str]
) -> None:
    """All commands (each makes one file), as many at a time as there are jobs; by ninja where it is there."""
    if wanted.ninja is not None:
        lines = ["rule run", "  command = $line"]
        for command, into in commands:
            line = shlex.join(command).replace("$", "$$")
            lines += [f"build {_ninja_path(into)}: run", f"  line = {line}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _run([wanted.ninja, "-C", str(folder), "-j", str(wanted.jobs)], environment)
        return
    with ThreadPoolExecutor(wanted.jobs) as pool:
        for result in [pool.submit(_run, command, environment) for command, _ in commands]:
            result.result()


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    if run.returncode:
        words = (run.stdout + run.stderr).strip().splitlines()
        errors = [line for line in words if re.search(r"error|fatal|unsupported", line, re.IGNORECASE)]
        told = (errors or words or ["it said nothing"])[0].strip()
        print(*words[-40:], sep="\n", file=sys.stderr)
        raise BuildError(f"{Path(command[0]).name} failed with status {run.returncode}: {told}")


def needed(library: Path) -> list[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = library.read_bytes()
    (table,), (size, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, table + i * size) for i in range(count)]
    names = []
    for _, kind, _, _, offset, length, link, _ in sections:
        if kind != 6:  # SHT_DYNAMIC
            continue
        strings = sections[link][4]
        for at in range(offset, offset + length, 16):
            tag, value = struct.unpack_from("<qQ", data, at)
            if tag == 1:  # DT_NEEDED
                start = strings + value
                names.append(data[start : data.index(b"\0", start)].decode())
    return names


def work_folder(environment: Mapping[str, str]) -> Path:
    """Where finished work is kept."""
    return Path(environment.get("D2VKERN_BUILD_DIR") or SOURCES.parent / "build" / "native").absolute()


def wheel_tag(built: bool) -> tuple[str, str, str]:
    """(python, abi, platform): no Python is in the library, so any will do."""
    if not built:
        return "py3", "none", "any"
    return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _find_nvcc(environment: Mapping[str, str]) -> tuple[Path | None, str]:
    """nvcc, or why there is none that serves."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if not path.is_file():
            return None, f"{path} (CUDA_HOME) does not exist"
    else:
        found = _which("nvcc", environment)
        if found is None:
            found = "/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").is_file() else None
        if found is None:
            return None, "there is no nvcc"
        path = Path(found)
    run = subprocess.run(
        [path, "--version"], capture_output=True, text=True, env=dict(environment), check=False
    )
    release = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if run.returncode or release is None:
        return None, f"{path} fails with status {run.returncode}"
    version = int(release[1]), int(release[2])
    if version < OLDEST_CUDA:
        return None, f"{path} is of CUDA {_dotted(version)}, {_dotted(OLDEST_CUDA)} or newer is needed"
    return path, ""


def _jobs(environment: Mapping[str, str]) -> int:
    given = environment.get("MAX_JOBS", "")
    if not given:
        return max(1, len(os.sched_getaffinity(0)))
    if not given.isdigit() or int(given) < 1:
        raise BuildError(f"MAX_JOBS must be a number from 1 on, got {given!r}")
    return int(given)


def _which(name: str, environment: Mapping[str, str]) -> str | None:
    """A program by name or path; CXX may hold options too."""
    words = shlex.split(name)
    found = shutil.which(words[0], path=environment.get("PATH", os.defpath)) if words else None
    return None if found is None else shlex.join([found, *words[1:]])


def _torch_version(torch: Path) -> tuple[int, int]:
    text = (torch / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def main() -> None:
    """python csrc/build.py: compile in place, for development."""
    root = SOURCES.parent
    init = (root / "d2vkern" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "([^"]+)"$', init, re.MULTILINE)
    assert version is not None
    print(build(version[1], root / "d2vkern" / "_C.so", work_folder(os.environ), os.environ, find_torch()))


if __name__ == "__main__":
    main()
