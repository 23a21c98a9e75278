"""EMA and AdamWEMA under DistributedDataParallel and on FSDP2's DTensors: two CPU processes, one machine.

Each process compares what it holds with the same training on whole tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from d2vkern import EMA, AdamWEMA, _shards, ema_update_

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)


def make_model() -> nn.Module:
    """Sizes that two processes cannot share evenly, and one that leaves a process nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 1))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def whole(backend: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, teacher's weights) of a training on plain tensors."""
    model = make_model()
    ema = EMA(model, 0.9, backend=backend)
    teachers = dict(zip(model.parameters(), ema.module.parameters(), strict=True))
    optimizer = AdamWEMA(model.parameters(), 0.01, teacher=teachers, backend=backend)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step(clip_factor=0.05 / norm, ema_decay=0.9)
        ema.update(model, step + 1)
    return dict(model.named_parameters()), dict(ema.module.named_parameters())


def sharded(backend: str, mesh: object) -> tuple[nn.Module, EMA, AdamWEMA]:
    """The same training on DTensors."""
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    ema = EMA(model, 0.9, backend=backend)
    for module in (model, ema.module):
        fully_shard(module, mesh=mesh)
    teachers = dict(zip(model.parameters(), ema.module.parameters(), strict=True))
    optimizer = AdamWEMA(model.parameters(), 0.01, teacher=teachers, backend=backend)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert _shards.is_sharded(norm)
        optimizer.step(clip_factor=0.05 / norm, ema_decay=0.9)
        ema.update(model, step + 1)
    return model, ema, optimizer


def check_fsdp(backend: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model, ema, optimizer = sharded(backend, init_device_mesh("cpu", (WORKERS,)))
    weights, teachers = whole(backend)
    for (name, p), (_, t) in zip(model.named_parameters(), ema.module.named_parameters(), strict=True):
        assert _shards.is_sharded(p) and _shards.is_sharded(t)
        assert _shards.is_sharded(optimizer.state[p]["exp_avg"])
        torch.testing.assert_close(p.full_tensor(), weights[name].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(t.full_tensor(), teachers[name], rtol=1e-5, atol=1e-6)
    p = next(model.parameters())
    try:
        ema_update_([torch.zeros(p.shape)], [p.detach()], 0.9)
        raise AssertionError("a whole teacher of a sharded student was taken")
    except ValueError as error:
        assert "ema: student[0] must be distributed like teacher[0], not distributed, got" in str(error)
    try:
        EMA(model)
        raise AssertionError("a sharded model was copied")
    except ValueError as error:
        assert "make the average first, then shard both alike" in str(error)


def check_ddp(backend: str) -> None:
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    ema = EMA(wrapped, 0.9, backend=backend)
    teachers = dict(zip(model.parameters(), ema.module.parameters(), strict=True))
    optimizer = AdamWEMA(wrapped.parameters(), 0.01, teacher=teachers, backend=backend)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(wrapped, step).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step(clip_factor=0.05 / norm, ema_decay=0.9)
        ema.update(wrapped, step + 1)
    weights, averages = whole(backend)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ema.module.get_parameter(name), averages[name], rtol=1e-5, atol=1e-6)


def check_all(rank: int, store: str) -> None:
    """What one process does."""
    from d2vkern import _native

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    for backend in ("eager",) if _native.problem() else ("eager", "native"):
        check_ddp(backend)
        check_fsdp(backend)
        print(f"rank {rank}, {backend}: agrees")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, {!r}); from tests import test_shards as t; t.check_all({}, {!r})"
    )
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(str(ROOT), rank, str(tmp_path / "store"))],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORKERS)
    ]
    try:
        for rank, run in enumerate(runs):
            out, _ = run.communicate(timeout=240)
            assert run.returncode == 0, out
            assert f"rank {rank}, eager: agrees" in out
    finally:
        for run in runs:
            run.kill()


def test_plain_tensors_pass_as_they_are() -> None:
    tensors = [torch.ones(2), None]
    assert not _shards.is_sharded(tensors[0]) and not _shards.is_sharded(3.0)
    assert _shards.local(tensors)[0] is tensors[0] and _shards.local(tensors)[1] is None
    assert _shards.replicated(0.5) == 0.5 and _shards.replicated(tensors[0]) is tensors[0]
    _shards.check_same_shards("op", "x", tensors[0], "y", tensors[0])
