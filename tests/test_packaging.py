"""What is built: a wheel whose top level is d2v and d2vkern, and an sdist that builds the same wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import d2vkern

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("d2v", "d2vkern", "kernels", "csrc", "tests", "benchmarks")
COMPILED = {"d2vkern/_C.so"} if shutil.which("g++") else set()


def _wheel(source: Path, target: Path, **settings: str) -> Path:
    """Built with the CPU extension where there is a compiler; what was compiled once is used again."""
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    environment = {"D2VKERN_BUILD_CUDA": "0", "D2VKERN_BUILD_DIR": str(ROOT / "build" / "native")}
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(target), str(source)],
        check=True,
        env=os.environ | environment | settings,
    )
    (wheel,) = target.glob("*.whl")
    return wheel


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building leaves folders behind."""
    target = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.name in BUILT_FROM:
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif path.is_file():
            shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    target = tmp_path_factory.mktemp("sdist")
    program = f"import setuptools.build_meta as backend; backend.build_sdist({str(target)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True)
    (archive,) = target.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    (unpacked,) = (path for path in target.iterdir() if path.is_dir())
    return unpacked


def test_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names = _names(wheel)
    assert {name.split("/")[0] for name in names} == {"d2v", "d2vkern"}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("d2v", "d2vkern")
        for path in (ROOT / package).rglob("*.py")
        if path != ROOT / "d2vkern" / "kernels" / "__init__.py"
    }
    expected |= {f"d2vkern/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.*")}
    expected |= {f"d2v/data/assets/{path.name}" for path in (ROOT / "d2v" / "data" / "assets").iterdir()}
    assert names == expected | COMPILED | {"d2vkern/py.typed", "d2vkern/measured.json"}


def _facts(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        return archive.read(name).decode()


def test_one_wheel_for_every_python(wheel: Path) -> None:
    """Its library holds nothing of Python's; with one it is for this platform, without for any."""
    platform = sysconfig.get_platform().replace("-", "_") if COMPILED else "any"
    assert wheel.name == f"d2vkern-{d2vkern.__version__}-py3-none-{platform}.whl"
    assert f"Root-Is-Purelib: {str(not COMPILED).lower()}\nTag: py3-none-{platform}\n" in _facts(wheel)
    assert wheel.stat().st_size < 5 << 20


def test_without_the_extension_the_wheel_is_pure(tree: Path, wheel: Path, tmp_path: Path) -> None:
    pure = _wheel(tree, tmp_path, D2VKERN_BUILD_CPU="0")
    assert pure.name == f"d2vkern-{d2vkern.__version__}-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in _facts(pure)
    assert _names(pure) == _names(wheel) - COMPILED


def test_a_wish_that_cannot_be_met_fails_the_build(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        _wheel(tree, tmp_path, D2VKERN_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))


def test_installed_extension_runs(wheel: Path, tmp_path: Path) -> None:
    if not COMPILED:
        pytest.skip("g++ is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import torch, d2vkern; from d2vkern import _native\n"
        "assert _native.problem() == '', _native.problem()\n"
        "t = [torch.zeros(3)]; d2vkern.ema_update_(t, [torch.ones(3)], 0.5, backend='native')\n"
        "print(t[0].sum())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "tensor(1.5000)"


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        scripts = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        assert metadata.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert f"Version: {d2vkern.__version__}\n" in text
    assert "License-Expression: MIT\n" in text
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", text, re.MULTILINE)
    assert sorted(required) == ["numpy", "nvtx", "torch>=2.10"]
    assert "d2v = d2v.cli.main:main" in scripts


def test_installed_wheel_finds_kernels_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import importlib.util, d2vkern\n"
        "print(d2vkern.__file__)\n"
        "print(importlib.util.find_spec('d2vkern.kernels._common').origin)\n"
        "assert importlib.util.find_spec('kernels') is None\n"
    )
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True, env=alone
    )
    package, kernels = run.stdout.split()
    assert package == str(tmp_path / "d2vkern" / "__init__.py")
    assert kernels == str(tmp_path / "d2vkern" / "kernels" / "_common.py")


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert list((sdist / "kernels").glob("*.py")) and list((sdist / "csrc").glob("*.cuh"))
    for name in ("build.py", "exports.map", "ops.cpp", "cpu.hpp", "ema.cu"):
        assert (sdist / "csrc" / name).is_file()
    assert not list(sdist.rglob("*.so")) and (sdist / "CHANGELOG.md").is_file()
    assert (sdist / "d2vkern" / "kernels" / "__init__.py").is_file()
    assert (sdist / "constraints.txt").is_file() and (sdist / "Makefile").is_file()
    assert _names(_wheel(sdist, tmp_path)) == _names(wheel)


def test_unpacked_sdist_runs_in_place(sdist: Path) -> None:
    program = "import importlib.util as u; print(u.find_spec('d2vkern.kernels._common').origin)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=sdist, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(sdist / "kernels" / "_common.py")


def test_constraints_pin_every_dependency() -> None:
    """Each requirement of pyproject.toml has an exact version, but torch and triton: see constraints.txt."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(
        r"^(?:dependencies|docs) = \[([^\n]*)\]$|^(?:train|dev) = \[(.*?)^\]",
        project,
        re.MULTILINE | re.DOTALL,
    )
    required = {
        re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        for group in listed
        for requirement in re.findall(r'"([^"]+)"', "".join(group))
    }
    pinned = set(
        re.findall(r"^([A-Za-z0-9._-]+)==[0-9]\S*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    # tomli serves Python 3.10 only.
    assert {"numpy", "pytest", "tyro", "mkdocstrings"} <= required and required - pinned == {
        "torch",
        "triton",
        "tomli",
    }
