"""The compiled extension when it is missing, broken, old or there twice: a reason, never an abort."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2vkern import _native
from d2vkern._backend import gaps
from d2vkern._native import About

ROOT = Path(__file__).resolve().parents[1]
VERSION = _native._version()
OK = "import d2vkern, torch; from d2vkern import _native\n"
RUNS = (
    "t = [torch.zeros(3)]; d2vkern.ema_update_(t, [torch.ones(3)], 0.5); assert t[0].tolist() == [0.5] * 3\n"
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of the built extension."""
    if not _native.FILE.is_file() or _native.inspect(_native.FILE):
        pytest.skip(f"no extension of this version: {_native.inspect(_native.FILE)}")
    return Path(shutil.copy(_native.FILE, tmp_path / "copy.so"))


def run(program: str, **environment: str) -> str:
    """What a fresh interpreter prints; fails when it does not end well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **environment},
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    reason = _native.inspect(tmp_path / "_C.so")
    assert reason.startswith(f"{tmp_path / '_C.so'} does not exist (it was not built;")
    assert "does not exist" in _native.inspect(tmp_path)


def test_files_that_are_not_this_library(tmp_path: Path) -> None:
    for content in (b"", b"garbage", b"#!/bin/sh\n" + b" " * 100, b"\x7fELF\x01\x01" + b"\0" * 100):
        (tmp_path / "_C.so").write_bytes(content)
        assert _native.inspect(tmp_path / "_C.so") == f"{tmp_path / '_C.so'} is no shared library"


def test_an_incomplete_copy_is_not_loaded(library: Path) -> None:
    whole = library.read_bytes()
    for size in (64, len(whole) // 2, len(whole) - 1):
        library.write_bytes(whole[:size])
        assert _native.inspect(library) == f"{library} is incomplete: {size} of {len(whole)} bytes"
    library.write_bytes(whole)
    assert _native.inspect(library) == ""


def test_a_library_of_another_version_is_not_loaded(library: Path) -> None:
    mark = b"d2vkern-native-version=%s;"
    whole = library.read_bytes()
    assert whole.count(mark % VERSION.encode()) == 1
    library.write_bytes(whole.replace(mark % VERSION.encode(), mark % b"9.9.9"))
    assert _native.inspect(library) == f"{library} is of version 9.9.9, this is d2vkern {VERSION}"
    library.write_bytes(whole.replace(b"d2vkern-native-version=", b"d2vkern-native-versioN="))
    assert "is of version unknown" in _native.inspect(library)


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _native.inspect(tmp_path) == "there is none for darwin"


def test_torch_must_know_the_abi(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, reason in (
        ("2.9.1", "torch must be 2.10 or newer, got 2.9.1"),
        ("2.10.0+cpu", ""),
        ("3.0", ""),
        ("odd", "torch must be 2.10 or newer, got odd"),
    ):
        monkeypatch.setattr(torch, "__version__", version)
        assert _native._torch_gap() == reason


def test_whatever_goes_wrong_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> str:
        raise PermissionError("not yours")

    _native.problem.cache_clear()
    try:
        monkeypatch.setattr(_native, "_load", broken)
        words = "the compiled extension is not used: PermissionError: not yours"
        assert gaps("ema", "native") == [words]
        assert gaps("mlp", "native") == ["not built yet in this version"]
        with pytest.raises(ImportError, match=words):
            _native.op("ema_update_", lambda: None)
    finally:
        _native.problem.cache_clear()


FACTS = About((0, 1, 0), 13000, ("sm_80", "sm_90a", "sm_100", "compute_100"))


@pytest.mark.parametrize(
    ("driver", "capability", "words"),
    [
        (13000, (8, 0), ""),
        (13010, (8, 9), ""),
        (13000, (9, 0), ""),
        (13000, (10, 0), ""),
        (13000, (10, 3), ""),
        (13000, (12, 0), ""),
        (12080, (9, 0), "needs a driver for CUDA 13.0, this one is for 12.8"),
        (0, (9, 0), "needs a driver for CUDA 13.0, this one is for 0.0"),
        (13000, (7, 5), "no code for compute capability 7.5, only sm_80, sm_90a, sm_100, compute_100"),
    ],
)
def test_cuda_needs_driver_and_device(driver: int, capability: tuple[int, int], words: str) -> None:
    found = _native.cuda_gap(FACTS, driver, capability)
    assert words in found and bool(words) == bool(found)


def test_code_of_one_architecture_runs_on_it_alone() -> None:
    assert _native.cuda_gap(About((0, 1, 0), 13000, ("sm_90a",)), 13000, (9, 0)) == ""
    assert "9.1" in _native.cuda_gap(About((0, 1, 0), 13000, ("sm_90a",)), 13000, (9, 1))
    assert "8.0" in _native.cuda_gap(About((0, 1, 0), 13000, ("sm_86",)), 13000, (8, 0))
    assert _native.cuda_gap(About((0, 1, 0), 13000, ("compute_90a",)), 13000, (9, 0)) == ""
    assert "10.0" in _native.cuda_gap(About((0, 1, 0), 13000, ("compute_90a",)), 13000, (10, 0))


def test_architectures_by_their_codes() -> None:
    assert list(map(_native._architecture, (800, 901, 1000, 1002))) == list(FACTS.architectures)
    assert list(map(_native._architecture, (903, 1203))) == ["compute_90a", "compute_120a"]


def test_versions_by_their_numbers() -> None:
    assert _native.numbers("0.1.0") == _native.numbers("0.1.0rc2") == (0, 1, 0)
    with pytest.raises(ValueError, match="version must begin with three numbers, got '1'"):
        _native.numbers("1")


def test_broken_files_break_nothing(tmp_path: Path) -> None:
    """In one process one after the other: import, eager and info go on, and the reason is told."""
    program = (
        OK + "assert not hasattr(torch.ops.d2vkern_native, 'about'), 'import d2vkern loads nothing'\n"
        f"_native.FILE = _native.Path({str(tmp_path / '_C.so')!r})\n"
        "for content in (None, b'', b'garbage' * 99, b'\\x7fELF\\x02\\x01' + b'\\xff' * 200):\n"
        "    if content is not None: _native.FILE.write_bytes(content)\n"
        "    _native.problem.cache_clear()\n"
        "    print(_native.problem())\n"
        "    " + RUNS + "try:\n"
        "    d2vkern.ema_update_(t, t, 0.5, backend='native')\n"
        "except d2vkern.BackendError as error:\n"
        "    print(error)\n"
        "from d2vkern import info\n"
        "print(info.render(info.collect()))\n"
    )
    out = run(program, D2VKERN_NATIVE="")
    assert out.count("the compiled extension is not used: ") >= 7
    assert "requested by argument backend, cannot run: the compiled extension is not used" in out
    assert "Available here: eager" in out


def test_it_can_be_switched_off() -> None:
    assert run(OK + RUNS + "print(_native.problem())", D2VKERN_NATIVE="0") == (
        "the compiled extension is not used: switched off by D2VKERN_NATIVE=0"
    )
    assert _native._load(_native.FILE, {"D2VKERN_NATIVE": "no"}) == (
        "environment D2VKERN_NATIVE must be 0 or 1, got 'no'"
    )


def test_a_second_copy_is_used_instead_of_loaded(library: Path) -> None:
    program = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        + OK
        + RUNS
        + "print(repr(_native.problem()))\n"
        "d2vkern.ema_update_(t, t, 0.5, backend='native')\n"
    )
    assert run(program) == "''"


def test_a_library_without_the_ops_is_left_alone(tmp_path: Path) -> None:
    """It has the right name in it, and loads, but defines nothing."""
    compiler = shutil.which("g++") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler")
    source = tmp_path / "empty.c"
    source.write_text(f'const char marker[] = "d2vkern-native-version={VERSION};";\n')
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "_C.so")], check=True)
    program = (
        OK
        + f"_native.FILE = _native.Path({str(tmp_path / '_C.so')!r})\n"
        + RUNS
        + "print(_native.problem())\n"
    )
    assert "ops are missing from torch.ops.d2vkern_native: adamw_ema_, " in run(program)


def test_ops_of_another_version_are_left_alone() -> None:
    """An older library that somebody loaded: a second definition of its ops would end the process."""
    schemas = "".join(f"library.define('{name}() -> ()')\n" for name in _native.OPS)
    program = (
        "import torch\n"
        "library = torch.library.Library('d2vkern_native', 'DEF')\n"
        "library.define('about() -> int[]')\n"
        "library.impl('about', lambda: [0, 0, 9, 0], 'CompositeExplicitAutograd')\n"
        + schemas
        + OK
        + RUNS
        + "print(_native.problem())\n"
    )
    assert run(program) == (
        "the compiled extension is not used: torch.ops.d2vkern_native is of version 0.0.9, loaded from "
        f"elsewhere; this is d2vkern {VERSION}"
    )
