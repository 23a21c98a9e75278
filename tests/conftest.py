"""Fixtures every test file may use: seeds, golden files, poisoned allocations; GPU tests skip without one."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from .interpreter import quicken

# Without a GPU the Triton kernels run in their interpreter, on CPU tensors; Triton reads this when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        quicken()

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available():
            if "triton_device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")
        elif "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def short_garbage_collections() -> None:
    """What imports and earlier files left is not walked again whenever a test collects garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain at the exit of what was never freed


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's fp32 convolutions round to TF32 unless told otherwise: no reference for anything in fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def no_backend_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests choose their backends themselves."""
    monkeypatch.delenv("D2VKERN_BACKEND", raising=False)


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run here: the GPU, or the CPU by Triton's interpreter (fp32 and fp16 only)."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of the golden files: `D2V_GOLDENS`, by default `../shared/goldens` beside the repository."""
    folder = Path(os.environ.get("D2V_GOLDENS", ROOT.parent / "shared" / "goldens"))
    if not folder.is_dir():
        pytest.skip(f"golden files absent: {folder} (set D2V_GOLDENS)")
    return folder


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN (integers: a large negative), so that reading before writing shows."""

    def poisoned(make):
        def allocate(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min // 2)

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
