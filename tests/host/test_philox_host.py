"""csrc/philox.cuh and normals.cuh, compiled for the host, against Python and the Random123 vectors."""

import math
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from d2vkern.reference import philox

ROOT = Path(__file__).resolve().parents[2]
ONES = 0xFFFFFFFF
# Random123, kat_vectors: philox4x32 10. (counter, key, words)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module")
def random_words() -> np.ndarray:
    """[1000, 6] uint32, with the extremes in the first rows."""
    words = np.random.default_rng(0).integers(0, 2**32, size=(1000, 6), dtype=np.uint32)
    words[0], words[1], words[2] = 0, ONES, 1 << 31
    return words


def _reference(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    c0, c1, c2, c3 = torch.from_numpy(counter.astype(np.int64)).unbind(1)
    k0, k1 = torch.from_numpy(key.astype(np.int64)).unbind(1)
    return torch.stack(philox.philox((c0, c1, c2, c3), (k0, k1)), 1).numpy().astype(np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "digits of pi"])
def test_known_answers(
    maths_host: ModuleType, counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    counters, keys = np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32)
    assert tuple(maths_host.philox_words(counters, keys)[0]) == expected
    assert tuple(_reference(counters, keys)[0]) == expected


def test_words_equal_the_reference(maths_host: ModuleType, random_words: np.ndarray) -> None:
    counter, key = random_words[:, :4].copy(), random_words[:, 4:].copy()
    np.testing.assert_array_equal(maths_host.philox_words(counter, key), _reference(counter, key))


@pytest.mark.parametrize("bound", [1, 2, 3, 196, 1 << 20, 1 << 31])
def test_below_equals_the_reference(maths_host: ModuleType, random_words: np.ndarray, bound: int) -> None:
    expected = philox.below(torch.from_numpy(random_words.astype(np.int64)), bound).numpy()
    np.testing.assert_array_equal(maths_host.philox_below(random_words, bound), expected)


def test_normal_is_within_four_ulp_of_the_reference(maths_host: ModuleType, random_words: np.ndarray) -> None:
    words = random_words[:, :4].copy()
    w0, w1, w2, w3 = torch.from_numpy(words.astype(np.int64)).unbind(1)
    expected = philox.normal((w0, w1, w2, w3)).numpy()
    actual = maths_host.philox_normal(words)
    assert np.abs(expected).max() > 3
    np.testing.assert_array_max_ulp(actual, expected, maxulp=4)


def test_every_radius_and_angle(maths_host: ModuleType) -> None:
    """All 2^24 of each within 1 ulp of torch's on a CPU; test_kernels_common.py has why that suffices."""
    count = torch.arange(1 << 24)
    angle = count.float().mul_(2.0 * math.pi * 2.0**-24)
    radius = (count + 1).float().mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    expected = (radius, angle.cos(), angle.sin())
    for values, reference in zip(maths_host.polar(), expected, strict=True):
        wanted = reference.numpy()
        error = np.abs(values.astype(np.float64) - wanted) / np.spacing(np.abs(wanted))
        assert error.max() <= 1


@pytest.mark.parametrize("seed", [0, -1, 1 << 40])
def test_noise_of_elements_equals_the_reference(maths_host: ModuleType, seed: int) -> None:
    rows, tokens = torch.tensor([0, 3, 70000, ONES]), torch.tensor([5, 0, 65536, 1])
    expected = philox.element_normals(rows, tokens, 12, seed=seed).numpy()
    k0, k1 = philox.split64(seed)
    words = rows.numpy().astype(np.uint32), tokens.numpy().astype(np.uint32)
    np.testing.assert_array_max_ulp(maths_host.element_normals(*words, 3, k0, k1), expected, maxulp=4)


def test_cuda_compiler_takes_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    kernel = tmp_path / "kernel.cu"
    kernel.write_text(
        '#include "normals.cuh"\n'
        "__global__ void draw(float* out) {\n"
        "  const d2v::Words words = d2v::philox(threadIdx.x, 0, 0, 0, 1, 2);\n"
        "  out[threadIdx.x] = d2v::below(words.w[0], 7) + d2v::normal_pair(words.w[2], words.w[3]).first;\n"
        "}\n"
    )
    target = ["-arch=sm_90", "-cubin", "-o", str(tmp_path / "kernel.cubin")]
    subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(kernel), *target], check=True)
    assert (tmp_path / "kernel.cubin").stat().st_size > 0
