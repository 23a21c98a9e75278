"""kernels/_common.py in the Triton interpreter and on a GPU: GELU's accuracy, Philox's bits, the normals."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from d2vkern.reference import philox

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "interpret_common.py"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """The script's inputs and outputs by name."""
    folder = tmp_path_factory.mktemp("interpreter")
    # Beyond 12 the tails vanish; 1001 is no multiple of the block.
    points = [np.linspace(-12, 12, 4096), [0.0, -0.0, 1e-30, -1e-30, 100, -100, 1e4, -1e4]]
    words = np.random.default_rng(0).integers(0, 2**32, size=(6, 1001), dtype=np.uint32)
    words[:, 0], words[:, 1] = 0, 2**32 - 1
    inputs = {"x": np.concatenate(points).astype(np.float32), "words": words}
    np.savez(folder / "in.npz", **inputs)
    interpret = "1" if request.param == "cpu" else "0"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": interpret,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, str(SCRIPT), str(folder / "in.npz"), str(folder / "out.npz"), request.param]
    subprocess.run(command, env=environment, check=True)
    return {**inputs, **np.load(folder / "out.npz")}


def test_gelu_is_as_exact_as_fp32_erf(results: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(results["x"]).double()
    error = (torch.from_numpy(results["gelu"]).double() - torch.nn.functional.gelu(x)).abs()
    # fp32 erf reaches 4.4e-7 on this interval; far out the result is x or 0 to fp32's precision.
    assert error[x.abs() <= 12].max() < 4.4e-7
    assert (error <= 4.4e-7 + x.abs() * 2.0**-23).all()


def test_gelu_gradient_is_exact(results: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(results["x"]).double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    assert (torch.from_numpy(results["gelu_grad"]).double() - expected).abs().max() < 4.4e-7


def test_philox_words_equal_the_reference(results: dict[str, np.ndarray]) -> None:
    c0, c1, c2, c3, k0, k1 = torch.from_numpy(results["words"].astype(np.int64))
    expected = torch.stack(philox.philox((c0, c1, c2, c3), (k0, k1))).numpy()
    np.testing.assert_array_equal(results["draws"], expected.astype(np.uint32))


def ulps(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance in units of the last place of `expected` itself, however small it is."""
    return np.abs(actual.astype(np.float64) - expected) / np.spacing(np.abs(expected))


def test_every_normal_is_within_4_ulp(results: dict[str, np.ndarray]) -> None:
    """All 2^24 radii and 2^24 angles against eager on the CPU.

    Factors within 1 ulp of eager's suffice. For mantissas r and c in [1, 2), the product is off by at most
    r + c ulp where r c < 2, else by (r + c) / 2: below 3, to first order, and by 4 after both are rounded.
    """
    count = torch.arange(1 << 24)
    angle = count.float().mul_(2.0 * math.pi * 2.0**-24)
    # The largest word's radius is 0, and so is the sine of angle 0.
    radius = (count + 1).float().mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    for actual, expected in zip(results["polar"], (radius, angle.cos(), angle.sin()), strict=True):
        assert ulps(actual, expected.numpy()).max() <= 1


def test_normals_equal_the_reference(results: dict[str, np.ndarray]) -> None:
    words = torch.from_numpy(results["draws"].astype(np.int64))
    expected = philox.normal((words[0], words[1], words[2], words[3])).T.numpy()
    error = ulps(results["normals"], expected)
    assert error.max() <= 4 and error.mean() < 0.5


def test_helpers_compile_without_a_gpu(tmp_path: Path) -> None:
    program = (
        "import triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "from interpret_common import gelu_kernel, normals_kernel, philox_kernel\n"
        "floats = dict(x_ptr='*fp32', y_ptr='*fp32', dy_ptr='*fp32', size='i32', BLOCK='constexpr')\n"
        "integers = dict(words_ptr='*i32', out_ptr='*i32', size='i32', BLOCK='constexpr')\n"
        "normals = dict(words_ptr='*i32', out_ptr='*fp32', size='i32', BLOCK='constexpr')\n"
        "kernels = (gelu_kernel, floats), (philox_kernel, integers), (normals_kernel, normals)\n"
        "for capability in (80, 90, 100):\n"
        "    for kernel, signature in kernels:\n"
        "        source = ASTSource(kernel, signature, constexprs={'BLOCK': 1024})\n"
        "        compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32))\n"
        "        print(len(compiled.asm['cubin']))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    sizes = [int(line) for line in run.stdout.split()]
    assert len(sizes) == 9 and min(sizes) > 1000
