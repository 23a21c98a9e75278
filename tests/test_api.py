"""What others build on: public names and their signatures, an import that costs little, threads and forks.

A change of signatures.txt is a change for users: `python -m tests.test_api` writes it anew, CHANGELOG.md says
what changed, and what goes is deprecated first (CONTRIBUTING.md).
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

import d2vkern

SIGNATURES = Path(__file__).with_name("signatures.txt")
METHODS = ("__init__", "step", "update", "add", "result", "to", "pin_memory", "collate", "from_mask",
           "from_ids_keep", "attention_lengths", "mask_major", "sample_major")  # fmt: skip


def _signature(function: Callable[..., object]) -> str:
    """Names, kinds and defaults of the arguments; annotations print differently in each Python."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def signatures() -> str:
    """A line for each public function, class and method of `METHODS`."""
    lines = []
    for name in sorted(d2vkern.__all__):
        value = getattr(d2vkern, name)
        if not inspect.isclass(value):
            lines.append(f"{name}{_signature(value)}")
            continue
        lines.append(f"class {name}({', '.join(base.__name__ for base in value.__bases__)})")
        own = [method for method in METHODS if method in vars(value)]
        lines += [f"{name}.{method}{_signature(getattr(value, method))}" for method in own]
    return "\n".join(lines) + "\n"


def test_signatures_are_those_that_users_build_on() -> None:
    assert signatures() == SIGNATURES.read_text(encoding="utf-8")


def test_every_public_name_is_documented() -> None:
    assert all(inspect.getdoc(getattr(d2vkern, name)) for name in d2vkern.__all__)


def test_import_brings_little_and_touches_no_device() -> None:
    """Beyond torch: nvtx. Neither Triton, nor Dynamo, nor a CUDA context."""
    program = (
        "import sys, torch; before = set(sys.modules); import d2vkern; new = set(sys.modules) - before;"
        "print(sorted({name.partition('.')[0] for name in new if '.' not in name}));"
        "print([name for name in new if name.startswith('torch.')], torch.cuda.is_initialized())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules, rest = found.stdout.splitlines()
    allowed = {"d2vkern", "nvtx", "numpy", "cython_runtime"}
    assert {name for name in ast.literal_eval(modules) if not name.startswith("_")} <= allowed
    assert rest == "[] False"


def _work(seed: int, backend: str | None) -> list[Tensor]:
    """Gather on a backend, attention and an MLP, forward and backward."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 12, 16, generator=generator, requires_grad=True)
    w1, w2 = (torch.randn(*shape, generator=generator) for shape in ((32, 16), (16, 32)))
    with d2vkern.use_backend(**({} if backend is None else {"gather": backend})):
        plan = d2vkern.random_mask(torch.arange(2), 3, 12, prob=0.5, seed=seed)
        kept = d2vkern.gather_tokens(x, plan)
        qkv = kept.view(kept.shape[0], -1, 1, 2, 8).expand(-1, -1, 3, -1, -1)
        out = d2vkern.gelu_mlp(d2vkern.multimask_attention(qkv), w1, torch.zeros(32), w2, torch.zeros(16))
        (dx,) = torch.autograd.grad(out.square().sum(), x)
    return [out.detach(), dx]


def _send(connection: Connection, seed: int) -> None:
    connection.send([value.numpy() for value in _work(seed, None)])


def test_threads_have_their_own_backends_and_the_same_results() -> None:
    jobs = [(seed, ("eager", None)[seed % 2]) for seed in range(12)]
    alone = [_work(*job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: _work(*job), jobs))
    for ours, theirs in zip(alone, together, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_computes_the_same() -> None:
    """As a DataLoader's workers are by default, after the ops have run here."""
    expected = _work(0, None)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_send, args=(there, 0))
    child.start()
    assert here.poll(60), "the forked process does not answer"
    got = here.recv()
    child.join(60)
    assert child.exitcode == 0
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(got, expected, strict=True))


if __name__ == "__main__":
    SIGNATURES.write_text(signatures(), encoding="utf-8")
