"""The compiled extension `d2vkern/_C.so`: found, looked at and loaded once, or the reason why it is not used.

Nothing here raises when the extension is missing, broken, of another version or already there: `problem`
says why it is not used, and `python -m d2vkern.info` and BackendError repeat it. The file is looked at before
it is loaded, because two faults would end the process instead of raising: a truncated file (a memory error in
the loader) and a second definition of ops that exist. `D2VKERN_NATIVE=0` leaves the extension alone.

Its ops live in torch.ops.d2vkern_native (csrc/ops.cpp has the schemas), and Python adds their fakes here.
What mutates its arguments does not count as a change for autograd; the functions in d2vkern/native say so.
"""

import ctypes
import mmap
import os
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

ENVIRONMENT = "D2VKERN_NATIVE"
FILE = Path(__file__).with_name("_C.so")
OPS = (
    "adamw_ema_",
    "adamw_ema_chunks_",
    "ema_update_",
    "ema_update_chunks_",
    "gather_bwd",
    "gather_fwd",
    "l2_norm",
    "mask_token_bwd",
    "masks_fwd",
    "scatter_bwd",
    "scatter_fwd",
)
OLDEST_TORCH = (2, 10)
_MARKER = re.compile(rb"d2vkern-native-version=([^;\0]*);")
_NAMESPACE = "d2vkern_native"
_library: torch.library.Library | None = None


@dataclass(frozen=True)
class About:
    """What the loaded library says of itself."""

    version: tuple[int, ...]
    cuda: int
    """CUDA runtime, 13000 for 13.0; 0 without CUDA"""
    architectures: tuple[str, ...]
    """such as "sm_80", "sm_90a", "compute_100" (PTX)"""


@cache
def problem() -> str:
    """Why the extension is not used; empty when it is loaded. Looks once per process."""
    try:
        reason = _load(FILE, os.environ)
    except Exception as error:  # whatever a broken installation does, import and eager go on
        reason = f"{type(error).__name__}: {error}"
    return reason and f"the compiled extension is not used: {reason}"


def about() -> About:
    """Facts of the loaded library. Call when `problem()` is empty."""
    with _disable_current_modes():  # which would write the question into the graph that they record
        major, minor, patch, cuda, *codes = torch.ops.d2vkern_native.about()
    return About((major, minor, patch), cuda, tuple(map(_architecture, codes)))


@cache
def cuda_problem(index: int | None = None) -> str:
    """Why the extension's CUDA kernels cannot run on a device (None: the current one); empty: they can."""
    if problem():
        return ""
    facts = about()
    if not facts.cuda:
        return "the compiled extension was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return cuda_gap(facts, _driver(), torch.cuda.get_device_capability(index))


def _driver() -> int:
    """The newest CUDA that the driver knows, 13000 for 13.0; 0 where the driver's library does not say.

    torch's builds do not all tell it, so the driver is asked: with a device in use its library is loaded.
    """
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value


def cuda_gap(facts: About, driver: int, capability: tuple[int, int]) -> str:
    """Whether a driver (13000: up to CUDA 13.0) and a device can run what was compiled; empty: yes."""
    if driver < facts.cuda:
        return (
            f"the compiled extension needs a driver for CUDA {_release(facts.cuda)}, "
            f"this one is for {_release(driver)}"
        )
    if not any(_runs_on(name, capability) for name in facts.architectures):
        return (
            f"the compiled extension has no code for compute capability {capability[0]}.{capability[1]}, "
            f"only {', '.join(facts.architectures)}"
        )
    return ""


def op(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The extension's op of that name, known to torch.compile by `fake`. Raises ImportError without it."""
    global _library
    if problem():
        raise ImportError(f"d2vkern: {problem()}")
    if _library is None:
        _library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    return getattr(torch.ops.d2vkern_native, name).default


def implement_cuda(name: str, run: Callable[..., Any]) -> None:
    """Let Python do the work of an op on CUDA tensors; after `op`."""
    assert _library is not None
    _library.impl(name, run, "CUDA")


def _load(path: Path, environment: Mapping[str, str]) -> str:
    switch = environment.get(ENVIRONMENT, "")
    if switch not in ("", "0", "1"):
        return f"environment {ENVIRONMENT} must be 0 or 1, got {switch!r}"
    if switch == "0":
        return f"switched off by {ENVIRONMENT}=0"
    if _defined("about"):
        return _mismatch()
    reason = _torch_gap() or inspect(path)
    if reason:
        return reason
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return _mismatch()


def inspect(path: Path) -> str:
    """Why a file cannot be this version's library, without loading it; empty: it can."""
    if sys.platform != "linux":
        return f"there is none for {sys.platform}"
    if not path.is_file():
        return f"{path} does not exist (it was not built; install with a C++ compiler to have it)"
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return f"{path} is no shared library"
        # The section table is the last thing in the file: an incomplete copy does not hold it.
        (sections,) = struct.unpack_from("<Q", header, 40)
        entry, count = struct.unpack_from("<HH", header, 58)
        if sections + entry * count > size:
            return f"{path} is incomplete: {size} of {sections + entry * count} bytes"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            marker = _MARKER.search(content)
            version = marker[1].decode(errors="replace") if marker else None
    wanted = _version()
    if version != wanted:
        return f"{path} is of version {version or 'unknown'}, this is d2vkern {wanted}"
    return ""


def _mismatch() -> str:
    """Why the ops that torch now has are not this version's."""
    missing = [name for name in OPS if not _defined(name)]
    if missing:
        return f"ops are missing from torch.ops.{_NAMESPACE}: {', '.join(missing)}"
    wanted, found = numbers(_version()), about().version
    if found != wanted:
        return (
            f"torch.ops.{_NAMESPACE} is of version {'.'.join(map(str, found))}, loaded from elsewhere; "
            f"this is d2vkern {_version()}"
        )
    return ""


def numbers(version: str) -> tuple[int, int, int]:
    """(0, 1, 0) of "0.1.0" and of "0.1.0rc2"."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"version must begin with three numbers, got {version!r}")
    return int(found[1]), int(found[2]), int(found[3])


def _torch_gap() -> str:
    found = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        return f"torch must be {'.'.join(map(str, OLDEST_TORCH))} or newer, got {torch.__version__}"
    return ""


def _defined(name: str) -> bool:
    return hasattr(getattr(torch.ops, _NAMESPACE), name)


def _version() -> str:
    from d2vkern import __version__

    return __version__


def _architecture(code: int) -> str:
    capability, kind = divmod(code, 10)
    return f"{'compute' if kind >= 2 else 'sm'}_{capability}{'a' if kind % 2 else ''}"


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    """sm_XY runs on its own major from that minor on, PTX on all that is newer, an "a" of both on just it."""
    kind, _, digits = name.partition("_")
    number = int(digits.rstrip("a"))
    built = divmod(number, 10)
    if name.endswith("a"):
        return capability == built
    if kind == "compute":
        return capability >= built
    return capability[0] == built[0] and capability[1] >= built[1]


def _release(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
