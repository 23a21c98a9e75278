"""The model is channels-last: a training step transposes no activation outside the ops.

Counted are the copies of PyTorch (clone, copy_, _to_copy: what `contiguous`, `reshape` and `to` become) of
which an input or output is a floating tensor whose memory order is not the order of its dimensions; sizes of
1 and broadcast dimensions aside. Not counted: copies inside an op's range
(`d2vkern/<op>/...`), where the op decides, and those of a tensor that has a parameter's sizes in whatever
order, which repack weights or their gradients. Allowed, and counted exactly: an image's pixels, which come
channels-first from the caller, become patches once in the student and once in the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import d2vkern
from d2v.config.fronts import ImageFront, WaveformFront
from d2v.model import Data2Vec
from d2vkern import _nvtx
from d2vkern._backend import STEMS
from d2vkern.testing import backend_spy
from tests.d2v.tiny_models import make_model, make_source

STEM = ((8, 10, 5), *(((8, 3, 2),) * 4), *(((8, 2, 2),) * 2))
COPIES = ("aten::clone", "aten::copy_", "aten::_to_copy")
Shape = tuple[int, ...]


def in_order(x: Tensor) -> bool:
    """Whether memory runs as the dimensions do."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and stride]
    return strides == sorted(strides, reverse=True)


class TransposingCopies(TorchDispatchMode):
    """Shapes of what is copied between memory orders in the block, outside and inside the ops' ranges."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.parameters = {tuple(sorted(n for n in p.shape if n > 1)) for p in parameters}
        self.depth = 0
        self.outside: list[Shape] = []
        self.inside: list[Shape] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in COPIES:
            given = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor) and x.is_floating_point()]
            moved = [x for x in given if not in_order(x)]
            if moved and tuple(sorted(n for n in out.shape if n > 1)) not in self.parameters:
                (self.inside if self.depth else self.outside).append(tuple(out.shape))
        return out

    @contextmanager
    def ranges(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The block with `depth` counting the open ranges of ops."""
        counter = self

        class Range:
            def __init__(self, domain: str, name: str, cost: Any = None) -> None:
                self.step = int(domain == _nvtx.OPS)

            def __enter__(self) -> None:
                counter.depth += self.step

            def __exit__(self, *error: object) -> None:
                counter.depth -= self.step

        with monkeypatch.context() as patch, _nvtx.force_ranges(True), self:
            patch.setattr(_nvtx, "_Range", Range)
            yield


def make(modality: str) -> tuple[Data2Vec, Tensor]:
    """A tiny model and a source of two samples; "waveform" is audio with the published front end."""
    if modality == "waveform":
        front = WaveformFront(conv_layers=STEM, position_groups=2, position_layers=2, position_width=14)
        return make_model("audio", front=front), make_source("audio", 2)[:, :2_000]
    return make_model(modality), make_source(modality, 2)


# Triton's interpreter takes minutes for the grid of an image.
STEPS = [(modality, "eager") for modality in ("image", "waveform", "audio", "text")]
STEPS += [("waveform", "triton"), ("text", "triton")]


@pytest.mark.parametrize(("modality", "backend"), STEPS)
def test_a_step_transposes_no_activation(
    modality: str, backend: str, monkeypatch: pytest.MonkeyPatch, triton_device: torch.device
) -> None:
    if triton_device.type != "cpu":
        pytest.skip("a GPU's backward runs in another thread, where the trace does not see it")
    model, source = make(modality)
    copies = TransposingCopies(list(model.parameters()))
    requested = dict.fromkeys(STEMS, backend)
    with d2vkern.use_backend("eager", **requested), backend_spy() as calls, copies.ranges(monkeypatch):
        model(source, ids=torch.arange(2)).loss.backward()
    assert ("mlp", backend) in calls
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    pixels = []
    if isinstance(front := model.cfg.front, ImageFront):
        pixels = [(2, *front.grid, front.channels, front.patch, front.patch)] * 2
    assert copies.outside == pixels


def test_the_count_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 5, 7, 3), nn.Parameter(torch.randn(4, 6))
    copies = TransposingCopies([weight])
    with copies.ranges(monkeypatch):
        x.movedim(-1, 1).contiguous()
        x.transpose(1, 2).reshape(2, -1)
        x.transpose(1, 2).to(torch.float16)
        torch.empty(2, 3, 5, 7).copy_(x.movedim(-1, 1))
        x[:, 1:3].contiguous()
        x[:1].expand(2, -1, -1, -1).contiguous()
        weight.t().contiguous()
        d2vkern.conv_block_2d(x.movedim(-1, 1), torch.randn(3, 7, 3, 3), backend="eager")
    # the last one's copy is made before its range opens
    assert copies.outside == [(2, 3, 5, 7), (2, 7, 5, 3), (2, 7, 5, 3), (2, 3, 5, 7), (2, 3, 5, 7)]
