"""csrc/philox.cuh, compiled for the host, against the Python reference and the Random123 vectors."""

import ctypes
import shutil
import subprocess
from pathlib import Path

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


class Host:
    """The compiled header; arrays in, arrays out."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def words(self, counter: np.ndarray, key: np.ndarray) -> np.ndarray:
        out = np.empty_like(counter)
        self._library.philox_words(
            _address(counter), _address(key), _address(out), ctypes.c_size_t(len(counter))
        )
        return out

    def below(self, words: np.ndarray, bound: int) -> np.ndarray:
        out = np.empty_like(words)
        size = ctypes.c_size_t(words.size)
        self._library.philox_below(_address(words), ctypes.c_uint32(bound), _address(out), size)
        return out

    def uniform(self, words: np.ndarray) -> np.ndarray:
        out = np.empty(words.shape, dtype=np.float32)
        self._library.philox_uniform(_address(words), _address(out), ctypes.c_size_t(words.size))
        return out

    def normal(self, words: np.ndarray) -> np.ndarray:
        out = np.empty(words.shape, dtype=np.float32)
        self._library.philox_normal(_address(words), _address(out), ctypes.c_size_t(len(words)))
        return out


def _address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("philox") / "libphilox.so"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "tests" / "host" / "philox_host.cpp"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return Host(library)


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
    host: Host, counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    counters, keys = np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32)
    assert tuple(host.words(counters, keys)[0]) == expected
    assert tuple(_reference(counters, keys)[0]) == expected


def test_words_equal_the_reference(host: Host, random_words: np.ndarray) -> None:
    counter, key = random_words[:, :4].copy(), random_words[:, 4:].copy()
    np.testing.assert_array_equal(host.words(counter, key), _reference(counter, key))


@pytest.mark.parametrize("bound", [1, 2, 3, 196, 1 << 20, 1 << 31])
def test_below_equals_the_reference(host: Host, random_words: np.ndarray, bound: int) -> None:
    expected = philox.below(torch.from_numpy(random_words.astype(np.int64)), bound).numpy()
    np.testing.assert_array_equal(host.below(random_words, bound), expected)


def test_uniform_equals_the_reference(host: Host, random_words: np.ndarray) -> None:
    expected = philox.uniform(torch.from_numpy(random_words.astype(np.int64))).numpy()
    np.testing.assert_array_equal(host.uniform(random_words).view(np.uint32), expected.view(np.uint32))


def test_normal_is_within_four_ulp_of_the_reference(host: Host, random_words: np.ndarray) -> None:
    words = random_words[:, :4].copy()
    w0, w1, w2, w3 = torch.from_numpy(words.astype(np.int64)).unbind(1)
    expected = philox.normal((w0, w1, w2, w3)).numpy()
    actual = host.normal(words)
    assert np.abs(expected).max() > 3
    np.testing.assert_array_max_ulp(actual, expected, maxulp=4)


def test_cuda_compiler_takes_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    kernel = tmp_path / "kernel.cu"
    kernel.write_text(
        '#include "normals.cuh"\n'
        "__global__ void draw(float* out) {\n"
        "  const d2v::Words words = d2v::philox(threadIdx.x, 0, 0, 0, 1, 2);\n"
        "  out[threadIdx.x] = d2v::uniform(words.w[0]) + d2v::normal_pair(words.w[2], words.w[3]).first;\n"
        "}\n"
    )
    target = ["-arch=sm_90", "-cubin", "-o", str(tmp_path / "kernel.cubin")]
    subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(kernel), *target], check=True)
    assert (tmp_path / "kernel.cubin").stat().st_size > 0
