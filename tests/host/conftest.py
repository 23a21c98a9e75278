"""The headers of csrc/ compiled for the host, once per session; tests skip without a compiler."""

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off")
SHARED = ("-pthread", "-shared", "-fPIC", "-fvisibility=hidden")
NAMES = ("maths_host", "kernels_host")

Builds = dict[str, tuple[subprocess.Popen[str], Path]]
"""name -> its compiler and what that writes"""


@pytest.fixture(scope="session")
def host_builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    """Both modules, still compiling side by side."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    python = Path(sysconfig.get_paths()["include"])
    # torch brings pybind11's headers along.
    pybind = Path(torch.__file__).parent / "include"
    for header in (python / "Python.h", pybind / "pybind11" / "pybind11.h"):
        if not header.is_file():
            pytest.skip(f"{header} is not installed")
    folder = tmp_path_factory.mktemp("host")
    includes = [
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests' / 'host'}",
        f"-isystem{pybind}",
        f"-isystem{python}",
    ]
    builds = {}
    for name in NAMES:
        library = folder / f"{name}.so"
        source = ROOT / "tests" / "host" / f"{name}.cpp"
        command = ["g++", *FLAGS, *SHARED, *includes, str(source), "-o", str(library)]
        builds[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), library
    yield builds
    for compiler, _ in builds.values():
        with compiler:  # closes its pipe and waits for it
            if compiler.poll() is None:
                compiler.kill()  # no test that ran wanted it


@pytest.fixture(scope="session")
def maths_host(host_builds: Builds) -> ModuleType:
    return _module(host_builds, "maths_host")


@pytest.fixture(scope="session")
def kernels_host(host_builds: Builds) -> ModuleType:
    return _module(host_builds, "kernels_host")


def _module(builds: Builds, name: str) -> ModuleType:
    compiler, library = builds[name]
    _, messages = compiler.communicate()
    assert compiler.returncode == 0, messages
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
