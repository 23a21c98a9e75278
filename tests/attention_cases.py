"""Cases of multimask_attention for its Triton tests: shapes, positions, padding, dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from d2vkern import multimask_attention
from d2vkern.kernels import _attention, _attention_tiles
from d2vkern.testing import assert_no_worse_than_eager, backend_spy

from .op_checks import values_and_gradients

SEED = 0x1234_5678_9ABC_DEF0
SCALES = (1.3, -0.5, 0.7, 0.0)
"""of the heads in turn: one is clamped, one stands where clamping begins"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call: shape (N, S, H, Dh) and what goes with it."""

    shape: tuple[int, int, int, int]
    extra: int | None = None
    """extra tokens in front; None: no positions"""
    lengths: tuple[int, ...] | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def inputs(self, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """qkv and, with positions, alibi_scale: leaves."""
        n, s, h, d = self.shape
        leaves = [torch.randn(n, s, 3, h, d).to(dtype)]
        if self.extra is not None:
            leaves.append(torch.tensor([SCALES[i % 4] for i in range(h)]))
        return [leaf.to(device).requires_grad_() for leaf in leaves]

    def op(self, backend: str, device: torch.device, **changes: Any) -> Callable[..., Tensor]:
        """The op as a function of the inputs. Slopes and positions are the same at every call."""
        n, s, h, _ = self.shape
        given: dict[str, Any] = {"backend": backend, **dict(self.settings), **changes}
        if self.lengths is not None:
            given.setdefault("lengths", torch.tensor(self.lengths, dtype=torch.int32, device=device))
        if self.extra is not None:
            given.setdefault("positions", make_positions(n, s, self.extra).to(device))
            given.setdefault("slopes", (0.02 + 0.3 * 0.7 ** torch.arange(h)).to(device))

        def call(qkv: Tensor, alibi_scale: Tensor | None = None) -> Tensor:
            return multimask_attention(qkv, alibi_scale=alibi_scale, **given)

        return call


@pytest.fixture
def in_few_programs(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes as long for a small tile as for a large one, so it gets large ones here.

    And fp32 runs the kernels of one tile too, as only 16 bits do on a GPU: it shows errors that fp16 hides.
    """
    if triton_device.type == "cpu":
        large = {side: 256 for side in ("BLOCK_M", "BLOCK_N")} | {"num_warps": 4}
        small = {side: 64 for side in ("BLOCK_M", "BLOCK_N")} | {"num_warps": 4}

        def chosen(kernel: str, bucket: str, candidates: list[dict[str, int]]) -> dict[str, int]:
            if "short" in kernel:
                return candidates[0]
            return small if bucket.startswith("S128") else large

        monkeypatch.setattr(_attention_tiles, "choose", chosen)
        monkeypatch.setitem(_attention.SHORT, 4, 64)


def make_positions(n: int, s: int, extra: int) -> Tensor:
    """[N,S] int32: -1 for the extra tokens, then ascending places in 3 S + 1, other ones in each row."""
    generator = torch.Generator().manual_seed(n * 1000 + s)
    places = torch.rand(n, 3 * s + 1, generator=generator).argsort(1)[:, : s - extra].sort(1).values
    return torch.cat([torch.full((n, extra), -1), places], 1).int()


def dropout(p: float) -> tuple[tuple[str, Any], ...]:
    return (("dropout_p", p), ("seed", SEED))


ATTEND = (("padded_rows", "attend"),)
CASES = {
    "one token": Case(shape=(2, 1, 4, 16), extra=0, lengths=(1, 0)),
    "seven tokens, twelve heads": Case(shape=(1, 7, 12, 80), extra=1),
    "eight tokens, whole counters": Case(shape=(2, 8, 4, 128), settings=dropout(0.4)),
    "image student": Case(shape=(1, 41, 4, 64)),
    "all at once": Case(shape=(3, 41, 1, 16), extra=2, lengths=(41, 20, 0), settings=dropout(0.3)),
    "narrow head, fixed scale": Case(shape=(2, 20, 4, 3), extra=1, settings=(("softmax_scale", 0.3),)),
    "a full tile": Case(shape=(2, 64, 1, 128), extra=1, lengths=(0, 50), settings=ATTEND),
    "one token more than a tile": Case(shape=(4, 65, 1, 64), extra=1, lengths=(65, 0, 1, 64)),
    "padded queries attend": Case(shape=(3, 70, 1, 16), extra=0, lengths=(0, 33, 70), settings=ATTEND),
    "tiles of four heads": Case(shape=(1, 125, 4, 16), extra=1),
    "whole counters, tiles": Case(shape=(1, 72, 1, 24), lengths=(66,), settings=dropout(0.5)),
    "counters across rows, tiles": Case(shape=(1, 67, 1, 16), extra=1, settings=dropout(0.2)),
    "speech student": Case(shape=(1, 300, 1, 80), extra=1, lengths=(259,)),
    "text teacher": Case(shape=(1, 513, 1, 64)),
}


def assert_matches_eager(case: Case, inputs: list[Tensor], **changes: Any) -> list[Tensor]:
    """Output and gradients: dtypes as eager's, error to fp64 at most twice eager's; and triton ran."""
    device = inputs[0].device
    exact = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    with backend_spy() as calls:
        ours = values_and_gradients(case.op("triton", device, **changes), inputs)
    assert calls == [("attention", "triton")]
    eager = values_and_gradients(case.op("eager", device, **changes), inputs)
    cpu = torch.device("cpu")
    moved = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in changes.items()}
    for actual, same_dtype, reference in zip(
        ours, eager, values_and_gradients(case.op("eager", cpu, **moved), exact), strict=True
    ):
        if actual.dtype == torch.float32 and actual.is_cuda and case.shape[1] == 1:
            # eager has no error where there is one token; exp2 and a sum's reciprocal have one rounding each
            torch.testing.assert_close(actual.cpu().double(), reference, rtol=1e-6, atol=1e-6)
        else:
            assert_no_worse_than_eager(actual.cpu(), same_dtype.cpu(), reference)
    return ours
