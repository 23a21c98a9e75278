"""csrc/build.py: what is compiled where, what is said about the rest, and one real library looked at."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from d2vkern import __version__

ROOT = Path(__file__).resolve().parents[1]
CUDA = "12.8"


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("d2vkern_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _module()


def program(path: Path, script: str) -> Path:
    """An executable that stands for a compiler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    """The folder of a torch package with headers of the oldest version that will do."""
    header = tmp_path / "site" / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    folder = tmp_path / "site" / "torch"
    (folder / "version.py").write_text("__all__ = ['__version__']\n__version__ = '2.10.0+cpu'\n")
    return folder


Environment = Callable[..., dict[str, str]]


@pytest.fixture
def machine(tmp_path: Path) -> Environment:
    """Makes the environment of a machine with the named programs on its PATH, and nothing else."""

    def make(*names: str, nvcc: str = CUDA, **settings: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name in names:
            says = f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'" if name == "nvcc" else "exit 0"
            program(folder / name, says)
        return {"PATH": str(folder), **settings}

    return make


@pytest.fixture(autouse=True)
def no_other_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without /usr/local/cuda."""
    exists = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: "/usr/local/cuda" not in str(self) and exists(self))


def test_with_everything(machine: Environment, torch: Path) -> None:
    plan = build.plan(machine("g++", "nvcc", "ninja"), torch)
    assert plan.parts == ("cpu", "cuda") and plan.why == () and not plan.must_have_cuda
    assert plan.architectures == ((80, ""), (90, "a"), (100, "+PTX"))
    assert build.architectures.codes_of(plan.architectures) == [800, 901, 1000, 1002]
    assert plan.ninja is not None and plan.jobs == len(os.sched_getaffinity(0))
    assert build.architectures.gencode(plan.architectures) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


# programs on the PATH, settings, parts, a word of the reason
CASES = {
    "without nvcc": (("g++",), {}, ("cpu",), "no CUDA kernels: there is no nvcc"),
    "any C++ compiler": (("c++",), {}, ("cpu",), "no nvcc"),
    "without a compiler": (("nvcc",), {}, (), "there is no C++ compiler"),
    "CUDA not wanted": (("g++", "nvcc"), {"D2VKERN_BUILD_CUDA": "0"}, ("cpu",), "D2VKERN_BUILD_CUDA=0"),
    "nothing wanted": (("g++", "nvcc"), {"D2VKERN_BUILD_CPU": "0"}, (), "D2VKERN_BUILD_CPU=0"),
    "CUDA asked for": (("g++", "nvcc"), {"D2VKERN_BUILD_CUDA": "1"}, ("cpu", "cuda"), ""),
    "CUDA asked for as elsewhere": (("g++", "nvcc"), {"FORCE_CUDA": "1"}, ("cpu", "cuda"), ""),
    "an old nvcc": (("g++", "nvcc-old"), {"CUDA_HOME": "old"}, ("cpu",), "is of CUDA 12.4, 12.8 or newer is"),
    "a failing nvcc": (("g++",), {"CUDA_HOME": "failing"}, ("cpu",), "fails with status 3"),
    "no nvcc in CUDA_HOME": (("g++", "nvcc"), {"CUDA_HOME": "empty"}, ("cpu",), "(CUDA_HOME) does not exist"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_planned(name: str, machine: Environment, torch: Path, tmp_path: Path) -> None:
    names, settings, parts, why = CASES[name]
    program(tmp_path / "old" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.1'")
    program(tmp_path / "failing" / "bin" / "nvcc", "echo release 13.0; exit 3")
    if "CUDA_HOME" in settings:
        settings = settings | {"CUDA_HOME": str(tmp_path / settings["CUDA_HOME"])}
    plan = build.plan(machine(*names, **settings), torch)
    assert plan.parts == parts
    assert why in "; ".join(plan.why) and bool(why) == bool(plan.why)


@pytest.mark.parametrize("wish", [{"D2VKERN_BUILD_CUDA": "1"}, {"FORCE_CUDA": "1"}], ids=str)
def test_only_an_explicit_wish_fails(wish: dict[str, str], machine: Environment, torch: Path) -> None:
    for names in (("g++",), ()):
        with pytest.raises(build.BuildError, match="CUDA kernels were asked for, but there is no"):
            build.plan(machine(*names, **wish), torch)
    with pytest.raises(
        build.BuildError, match="CUDA kernels were asked for, but torch's headers are not in this"
    ):
        build.plan(machine("g++", "nvcc", **wish), None)
    assert build.plan(machine("g++", **wish | {"D2VKERN_BUILD_CUDA": "0"}), torch).parts == ("cpu",)


def test_torch_headers(machine: Environment, torch: Path) -> None:
    environment = machine("g++")
    assert "torch's headers are not in this environment" in build.plan(environment, None).why[0]
    (torch / "version.py").write_text("__version__ = '2.9.1'\n")
    assert build.plan(environment, torch).why == ("torch's headers are older than 2.10",)
    (torch / "version.py").write_text("__version__ = '3.0.0'\n")
    assert build.plan(environment, torch).parts == ("cpu",)
    (torch / "include/torch/csrc/stable/library.h").unlink()
    assert build.plan(environment, torch).parts == ()
    found = build.find_torch()
    assert found is not None and (found / "include").is_dir()


def test_other_systems(machine: Environment, torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build.plan(machine("g++"), torch).why == ("nothing is compiled on darwin",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"D2VKERN_BUILD_CUDA": "yes"}, "D2VKERN_BUILD_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a number from 1 on, got '0'"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, str], words: str, machine: Environment, torch: Path
) -> None:
    with pytest.raises(build.BuildError, match=words):
        build.plan(machine("g++", "nvcc", **settings), torch)


A100, PTX = (80, ""), "+PTX"
# TORCH_CUDA_ARCH_LIST, what is built of it, words on what is left out
LISTS = {
    "spaces and an old GPU": ("7.5 8.0 9.0", (A100, (90, "")), "'7.5' (older than 8.0)"),
    "code and PTX of one GPU alone": ("9.0a+PTX", ((90, "a+PTX"),), ""),
    "a name": ("Hopper", ((90, PTX),), ""),
    "a name of several": ("Ampere;Ada", (A100, (86, PTX), (89, PTX)), ""),
    "a name with a plus": ("Ampere+Tegra", ((87, ""),), ""),
    "a name in small letters": ("hopper", ((90, PTX),), ""),
    "an old name beside": ("Turing 8.0", (A100,), "'7.5+PTX' (older than 8.0)"),
    "commas, twice the same": ("8.0, 8.0;9.0", (A100, (90, "")), ""),
    "no word": (" ; ", ((80, ""), (90, "a"), (100, PTX)), ""),
    "what is no architecture": ("8.0;fast;12", (A100,), "'fast' (not like '8.0;9.0a;10.0+PTX'); '12' (not"),
    "no such code": ("8.0;8.6a", (A100,), "'8.6a' (there is no such code before 9.0a)"),
    "newer than nvcc": ("9.0;12.0+PTX", ((90, ""),), "'12.0+PTX' (this nvcc does not know it)"),
    "native without a GPU": (
        "native",
        ((80, ""), (90, "a"), (100, PTX)),
        "'native' (nvidia-smi names no GPU",
    ),
    "old only": ("7.0;7.5", (), "leaves nothing to build: '7.0' (older than 8.0); '7.5' (older"),
    "no architecture at all": ("fast", (), "leaves nothing to build: 'fast' (not like"),
}


@pytest.mark.parametrize("name", LISTS)
def test_architectures_as_torch_takes_them(
    name: str, machine: Environment, torch: Path, tmp_path: Path
) -> None:
    """What can be built is; the rest is named, and fails nothing that was not asked for."""
    text, architectures, words = LISTS[name]
    environment = machine("g++", "nvcc", TORCH_CUDA_ARCH_LIST=text)
    says = "compute_80 compute_86 compute_87 compute_89 compute_90 compute_100".replace(" ", "\\n")
    program(
        tmp_path / "bin" / "nvcc",
        f"case $1 in --list*) printf '{says}\\n';; *) echo release {CUDA}, V{CUDA}.1;; esac",
    )
    plan = build.plan(environment, torch)
    assert plan.architectures == architectures and ("cuda" in plan.parts) == bool(architectures)
    assert words in "; ".join(plan.why) and bool(words) == bool(plan.why)
    if architectures:
        assert build.plan(environment | {"FORCE_CUDA": "1"}, torch).architectures == architectures
    else:
        with pytest.raises(build.BuildError, match="asked for, but TORCH_CUDA_ARCH_LIST leaves nothing"):
            build.plan(environment | {"FORCE_CUDA": "1"}, torch)


def test_architectures_of_the_gpus_here(machine: Environment, torch: Path, tmp_path: Path) -> None:
    environment = machine("g++", "nvcc", TORCH_CUDA_ARCH_LIST="native")
    program(tmp_path / "bin" / "nvidia-smi", "printf '9.0\\n8.0\\n9.0\\n'")
    assert build.plan(environment, torch).architectures == (A100, (90, PTX))
    program(tmp_path / "bin" / "nvidia-smi", "echo 9.0; exit 9")
    assert build.plan(environment, torch).architectures[0] == A100


def test_flags_and_codes_of_code_for_one_gpu_alone() -> None:
    alone = ((90, "a+PTX"), (90, "a"), (90, PTX))
    assert build.architectures.gencode(alone) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build.architectures.codes_of(alone) == [901, 903, 900, 902]
    assert build.architectures.names(alone) == "sm_90a, sm_90, compute_90a PTX, compute_90 PTX"


def test_torch_knows_the_same_names() -> None:
    """torch's parser is asked itself, for each name and each architecture we leave to it."""
    from torch.utils import cpp_extension

    for name, meaning in build.architectures.NAMED.items():
        written = "+".join(word.capitalize() for word in name.split("+"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_CUDA_ARCH_LIST", written)
            flags = cpp_extension._get_cuda_arch_flags()
            patch.setenv("TORCH_CUDA_ARCH_LIST", meaning)
            assert flags == cpp_extension._get_cuda_arch_flags()


def test_settings_count(machine: Environment, torch: Path) -> None:
    environment = machine("g++", "nvcc", TORCH_CUDA_ARCH_LIST="8.6 9.0a 9.0", MAX_JOBS="3")
    plan = build.plan(environment, torch)
    assert plan.architectures == ((86, ""), (90, "a"), (90, "")) and plan.jobs == 3 and not plan.debug
    assert build.plan(environment | {"D2VKERN_DEBUG": "1"}, torch).debug
    assert build.plan(environment | {"MAX_JOBS": ""}, torch).jobs == len(os.sched_getaffinity(0))
    plan = build.plan(machine("clang++", CXX="clang++ -stdlib=libc++"), torch)
    assert plan.compiler is not None and plan.compiler.endswith("clang++ -stdlib=libc++")


def test_a_failing_compiler_leaves_pure_python(machine: Environment, torch: Path, tmp_path: Path) -> None:
    environment = machine("nvcc")
    program(tmp_path / "bin" / "g++", "echo 'x.cpp:1: error: no space left' >&2; exit 1")
    target = tmp_path / "out" / "_C.so"
    target.parent.mkdir()
    target.write_text("of before")
    words = build.build("0.1.0", target, tmp_path / "work", environment, torch)
    assert words.startswith("d2vkern: built pure Python, eager and Triton only; no CUDA kernels: ")
    assert "no compiled extension: g++ failed with status 1: x.cpp:1: error: no space left" in words
    assert not target.exists()
    with pytest.raises(build.BuildError, match="failed with status"):
        build.build("0.1.0", target, tmp_path / "work", environment | {"FORCE_CUDA": "1"}, torch)


def test_wheel_tags() -> None:
    assert build.wheel_tag(False) == ("py3", "none", "any")
    python, abi, platform = build.wheel_tag(True)
    assert (python, abi) == ("py3", "none")
    # what it really runs on is for auditwheel to say
    assert platform.startswith("linux_") and "manylinux" not in platform


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU extension, compiled here; again only when sources or flags have changed."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    target = tmp_path_factory.mktemp("library") / "_C.so"
    environment = dict(os.environ) | {"D2VKERN_BUILD_CUDA": "0"}
    words = build.build(__version__, target, ROOT / "build" / "native", environment, build.find_torch())
    assert words == "d2vkern: built CPU kernels; no CUDA kernels: D2VKERN_BUILD_CUDA=0"
    return target


def test_what_the_library_needs_and_shows(library: Path) -> None:
    needed = build.needed(library)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name or "torch_" in name]
    assert library.stat().st_size < 1 << 20
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    defined = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert defined.stdout == ""
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1].partition("@")[0] for line in wanted.stdout.splitlines()]
    torch_symbols = [name for name in symbols if "torch" in name or "c10" in name or "aten" in name]
    # nothing of torch but its C interface: mangled names change from version to version
    assert torch_symbols and all(name.startswith(("aoti_torch_", "torch_")) for name in torch_symbols)
    assert not [name for name in symbols if "cuda" in name and name != "aoti_torch_device_type_cuda"]
    unique = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
    assert " u " not in unique.stdout


def test_it_is_not_built_again(library: Path, tmp_path: Path) -> None:
    """The same sources and flags: the finished library is copied, no compiler is asked."""
    environment = dict(os.environ) | {"D2VKERN_BUILD_CUDA": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_run", lambda *command: pytest.fail(f"ran {command}"))
        build.build(
            __version__, tmp_path / "_C.so", ROOT / "build" / "native", environment, build.find_torch()
        )
    assert (tmp_path / "_C.so").read_bytes() == library.read_bytes()


@pytest.mark.parametrize("with_ninja", [True, False], ids=["ninja", "threads"])
def test_commands_run_side_by_side(with_ninja: bool, tmp_path: Path, torch: Path) -> None:
    ninja = shutil.which("ninja")
    if with_ninja and ninja is None:
        pytest.skip("ninja is not installed")
    folder = tmp_path / "a folder"
    folder.mkdir()
    into = [folder / f"{name}.o" for name in "abc"]
    commands = [(["/bin/sh", "-c", f"echo '$HOME {i}' > '{path}'"], path) for i, path in enumerate(into)]
    plan = build.Plan("g++", torch, None, jobs=2, ninja=ninja if with_ninja else None)
    build._run_all(commands, plan, folder, os.environ)
    assert [path.read_text() for path in into] == [f"$HOME {i}\n" for i in range(3)]
    failing = [(["/bin/sh", "-c", "echo 'fatal: no'; exit 7"], folder / "d.o")]
    with pytest.raises(build.BuildError, match="failed with status .*: .*fatal: no|FAILED"):
        build._run_all(failing, plan, folder, os.environ)


def test_a_library_without_libtorch_is_refused(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that entry a CUDA build would find no stream, and loading would fail."""
    monkeypatch.setattr(build, "needed", lambda path: ["libc.so.6"])
    monkeypatch.setattr(build, "_run_all", lambda *arguments: None)
    monkeypatch.setattr(build, "_run", lambda command, environment: Path(command[-1]).touch())
    environment = dict(os.environ) | {"D2VKERN_BUILD_CUDA": "0"}
    words = build.build(__version__, tmp_path / "_C.so", tmp_path / "work", environment, build.find_torch())
    assert "the linker left libtorch.so out of what the library needs: ['libc.so.6']" in words
    assert not (tmp_path / "_C.so").exists()
