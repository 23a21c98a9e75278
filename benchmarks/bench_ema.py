"""The teacher's moving average over a preset's parameters, against torch's foreach and a plain loop."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

import d2vkern
from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Size, normal, parameter_shapes
from d2v.config.presets import preset as load_preset


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """fp32 teacher and student, as the trainer holds them; also with low-precision copies of the teacher."""
    plain = _case(preset, None)
    return [plain] if dtype == torch.float32 else [plain, _case(preset, dtype)]


def _case(preset: str, copies: torch.dtype | None) -> Case:
    sizes = parameter_shapes(preset)
    count = sum(prod(size) for size in sizes)
    decay = load_preset(preset).ema.decay

    def make(device: torch.device) -> Inputs:
        inputs = {name: [normal(device, *size) for size in sizes] for name in ("teacher", "student")}
        if copies is not None:
            inputs["copies"] = [torch.empty(size, dtype=copies, device=device) for size in sizes]
        return inputs

    def call(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
        d2vkern.ema_update_(**inputs, decay=decay, backend=backend)
        return _state(inputs)

    def plain(inputs: Inputs) -> dict[str, Tensor]:
        for t, s in zip(inputs["teacher"], inputs["student"], strict=True):
            t.mul_(decay).add_(s, alpha=1 - decay)
        return _copied(inputs)

    def foreach(inputs: Inputs) -> dict[str, Tensor]:
        torch._foreach_lerp_(inputs["teacher"], inputs["student"], 1 - decay)
        return _copied(inputs)

    return Case(
        op="ema_update_",
        name="fp32" if copies is None else f"fp32 and {str(copies).removeprefix('torch.')} copies",
        preset=preset,
        shape=f"{len(sizes)} tensors, {count / 1e6:.1f} M",
        dtype=torch.float32,
        make=make,
        call=call,
        plain=plain,
        forward=Cost(count * (12 + (copies.itemsize if copies is not None else 0)), 0),
        peers={"foreach lerp": foreach},
    )


def _copied(inputs: Inputs) -> dict[str, Tensor]:
    """The low-precision copies, where the case has them, as a pass of their own."""
    if "copies" in inputs:
        torch._foreach_copy_(inputs["copies"], inputs["teacher"])
    return _state(inputs)


def _state(inputs: Inputs) -> dict[str, Tensor]:
    """Everything the update writes, by name."""
    written = (name for name in ("teacher", "copies") if name in inputs)
    return {f"{name}[{i}]": tensor for name in written for i, tensor in enumerate(inputs[name])}
