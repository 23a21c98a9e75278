"""No [.., S, S] tensor in a training step of speech, where attention itself makes none.

Every tensor that an operator returns is looked at, S being the lengths that attention is called with. Around
an attention that is one operator the step must make none at all; eager may, a chunk of sequences at a time.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2v.data.types import Batch
from d2v.train.pretrain_step import Trainer
from d2vkern import _native
from d2vkern._backend import REGISTRY, Implementation
from d2vkern.reference import attention as reference
from tests.d2v.tiny_models import make_source
from tests.d2v.tiny_runs import tiny

HEADS = 1
PASSING = 12
"""tensors of one chunk's scores that eager may hold at once: scores, probabilities, gradients, distances"""


class Squares(TorchDispatchMode):
    """Notes storages seen as [.., S, S]: how many there were per S, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = defaultdict(int)
        self.peak: dict[int, int] = defaultdict(int)
        self._alive: dict[int, dict[int, tuple[StorageWeakRef, int]]] = defaultdict(dict)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2]:
                size, storage = tensor.shape[-1], tensor.untyped_storage()
                self._alive[size][storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.seen[size] += 1
                self.peak[size] = max(self.peak[size], self.alive(size))
        return out

    def alive(self, size: int) -> int:
        """Bytes of the storages of that size that still exist."""
        alive = {key: one for key, one in self._alive[size].items() if not one[0].expired()}
        self._alive[size] = alive
        return sum(nbytes for _, nbytes in alive.values())


_lengths: set[int] = set()


@torch.library.custom_op("d2vkern_tests::attention", mutates_args=())
def _forward(
    qkv: Tensor,
    positions: Tensor | None,
    slopes: Tensor | None,
    alibi_scale: Tensor | None,
    lengths: Tensor | None,
    padded_rows: str,
) -> Tensor:
    _lengths.add(qkv.shape[1])
    with torch.no_grad():
        return reference.multimask_attention(
            qkv, positions, slopes, alibi_scale, lengths, padded_rows=padded_rows
        )


@torch.library.custom_op("d2vkern_tests::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    qkv: Tensor,
    positions: Tensor,
    slopes: Tensor,
    alibi_scale: Tensor,
    lengths: Tensor | None,
    padded_rows: str,
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaves = qkv.detach().requires_grad_(), alibi_scale.detach().requires_grad_()
        out = reference.multimask_attention(
            leaves[0], positions, slopes, leaves[1], lengths, padded_rows=padded_rows
        )
        dqkv, dscale = torch.autograd.grad(out, leaves, dout)
    return dqkv, dscale


class _OneOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:5])
        ctx.padded_rows = inputs[5]
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dqkv, dscale = _backward(dout, *ctx.saved_tensors, ctx.padded_rows)
        return dqkv, None, None, dscale, None, None


def multimask_attention(
    qkv: Tensor,
    positions: Tensor | None,
    slopes: Tensor | None,
    alibi_scale: Tensor | None,
    lengths: Tensor | None,
    softmax_scale: float | None,
    dropout_p: float,
    seed: object,
    padded_rows: str,
) -> Tensor:
    """A fused attention as seen from outside: one operator forward, one backward."""
    assert softmax_scale is None and not dropout_p
    return _OneOperator.apply(qkv, positions, slopes, alibi_scale, lengths, padded_rows)


def watched_step(backend: str, device: torch.device) -> tuple[Squares, int]:
    """What a step of a tiny speech model made, and the bytes of it alive between forward and backward."""
    cfg = tiny(
        "audio", model={"heads": HEADS, "attention_dropout": 0.0}, train={"backend": f"attention={backend}"}
    )
    mask = dataclasses.replace(cfg.model.mask, clones=8)
    trainer = Trainer(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, mask=mask)), device)
    held: list[int] = []
    squares = Squares()
    trainer.model.register_forward_hook(
        lambda *_: held.append(sum(squares.alive(size) for size in sorted(_lengths)))
    )
    batch = Batch(make_source("audio", 4), torch.arange(4), 0).to(device)
    with squares:
        trainer.step(1, [batch])
    return squares, held[0]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`native` is this module's attention."""
    _lengths.clear()
    _native.problem()  # loads the extension, whose other ops run too
    monkeypatch.setitem(REGISTRY["attention"], "native", Implementation(__name__))
    monkeypatch.setattr(_native, "problem", lambda: "")


CPU = torch.device("cpu")


def lengths_of_a_step() -> tuple[int, int]:
    """S of the student and of the teacher; neither is a width of the model, or squares would mean nothing."""
    watched_step("native", CPU)
    short, long = sorted(_lengths)
    assert 16 < short < long and {short, long}.isdisjoint({16, 32, 48, 64})
    return short, long


def test_nothing_around_attention_makes_scores() -> None:
    squares, _ = watched_step("native", CPU)
    assert len(_lengths) == 2
    assert {size: squares.seen[size] for size in _lengths} == dict.fromkeys(_lengths, 0)
    assert sum(squares.seen.values()), "the watch saw no square at all, not even a weight"


def test_the_watch_sees_a_bias() -> None:
    short, long = lengths_of_a_step()
    squares, held = watched_step("sdpa", CPU)
    assert squares.seen[short] > 0 and squares.seen[long] > 0
    assert held >= 32 * HEADS * short * short * 4


def test_eager_holds_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = lengths_of_a_step()
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)  # a chunk is a sequence
    squares, held = watched_step("eager", CPU)
    assert held == 0, "scores are kept for backward"
    for size in (short, long):
        assert 0 < squares.peak[size] <= PASSING * HEADS * size * size * 4
    assert PASSING < 32 <= squares.seen[short]


@pytest.mark.skipif("triton" not in REGISTRY["attention"], reason="attention has no Triton kernels here")
def test_triton_makes_no_scores(triton_device: torch.device) -> None:
    short, long = lengths_of_a_step()
    squares, held = watched_step("triton", triton_device)
    assert squares.seen[short] == squares.seen[long] == held == 0
