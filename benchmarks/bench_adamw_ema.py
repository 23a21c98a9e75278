"""Optimizer step, moving average and low-precision copies over all parameters, against torch's fused AdamW.

And the norm of all gradients, against torch's.

eps_mode is torch's, because no peer has fairseq's; the arithmetic is the same. The clip factor is 1, so that
gradients, which some backends scale in place, stay what they are however often the step is timed.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Cost, Inputs
from benchmarks.shapes import Size, normal, parameter_shapes
from d2v.config.presets import preset as load_preset
from d2vkern import AdamWEMA, grad_norm


def cases(preset: str, size: Size, dtype: torch.dtype) -> list[Case]:
    """The norm; the step with the teacher; in low precision also with copies of parameters and teacher."""
    plain = [_norm(preset), _case(preset, None)]
    return plain if dtype == torch.float32 else [*plain, _case(preset, dtype)]


def _norm(preset: str) -> Case:
    sizes = parameter_shapes(preset)
    count = sum(prod(size) for size in sizes)

    def make(device: torch.device) -> Inputs:
        return {"grads": [normal(device, *size) for size in sizes]}

    return Case(
        op="grad_norm",
        name="fp32",
        preset=preset,
        shape=f"{len(sizes)} tensors, {count / 1e6:.1f} M",
        dtype=torch.float32,
        make=make,
        call=lambda inputs, backend: grad_norm(inputs["grads"], backend=backend),
        plain=lambda inputs: torch.nn.utils.get_total_norm(inputs["grads"]),
        forward=Cost(4 * count, 0),
    )


def _case(preset: str, low: torch.dtype | None) -> Case:
    sizes, cfg = parameter_shapes(preset), load_preset(preset)
    count, optim, decay = sum(prod(size) for size in sizes), cfg.optim, cfg.ema.decay
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }

    def make(device: torch.device) -> Inputs:
        inputs: Inputs = {
            name: [normal(device, *size) for size in sizes] for name in ("params", "grads", "teacher")
        }
        if low is not None:
            for name in ("copies", "teacher_copies"):
                inputs[name] = [torch.empty(size, dtype=low, device=device) for size in sizes]
        return inputs

    def call(inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
        if "ours" not in inputs:
            attached: dict[str, Any] = {
                name: inputs.get(name) for name in ("teacher", "copies", "teacher_copies")
            }
            inputs["ours"] = AdamWEMA(_with_gradients(inputs), **settings, **attached)
            inputs["clip"] = torch.ones((), device=inputs["params"][0].device)
        optimizer = inputs["ours"]
        optimizer.backend = backend
        optimizer.step(clip_factor=inputs["clip"], ema_decay=decay)
        return _state(inputs)

    def fused(inputs: Inputs) -> dict[str, Tensor]:
        if "torch" not in inputs:
            on_gpu = inputs["params"][0].is_cuda
            inputs["torch"] = torch.optim.AdamW(
                _with_gradients(inputs), **settings, fused=True, capturable=on_gpu
            )
        inputs["torch"].step()
        with torch.no_grad():
            torch._foreach_lerp_(inputs["teacher"], inputs["params"], 1 - decay)
        return _copied(inputs)

    def plain(inputs: Inputs) -> dict[str, Tensor]:
        _by_formula(inputs, decay, **settings)
        return _copied(inputs)

    return Case(
        op="AdamWEMA",
        name="fp32" if low is None else f"fp32 and {str(low).removeprefix('torch.')} copies",
        preset=preset,
        shape=f"{len(sizes)} tensors, {count / 1e6:.1f} M",
        dtype=torch.float32,
        make=make,
        call=call,
        plain=plain,
        forward=Cost(count * (36 + (2 * low.itemsize if low is not None else 0)), 0),
        peers={"fused AdamW + foreach lerp": fused},
        gate_calls=3,
    )


def _with_gradients(inputs: Inputs) -> list[Tensor]:
    """The parameters as an optimizer wants them."""
    for p, g in zip(inputs["params"], inputs["grads"], strict=True):
        p.requires_grad_()
        p.grad = g
    return inputs["params"]


@torch.no_grad()
def _by_formula(
    inputs: Inputs, decay: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Decoupled weight decay, the two moments, the step, the average: tensor by tensor."""
    params, grads = inputs["params"], inputs["grads"]
    state: dict[str, Any] = inputs.setdefault(
        "plain",
        {
            "step": 0,
            "m": [torch.zeros_like(p) for p in params],
            "v": [torch.zeros_like(p) for p in params],
        },
    )
    state["step"] += 1
    bias1, bias2 = (1 - beta ** state["step"] for beta in betas)
    for p, g, m, v, t in zip(params, grads, state["m"], state["v"], inputs["teacher"], strict=True):
        p.mul_(1 - lr * weight_decay)
        m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        p.addcdiv_(m, (v / bias2).sqrt_().add_(eps), value=-lr / bias1)
        t.mul_(decay).add_(p, alpha=1 - decay)


@torch.no_grad()
def _copied(inputs: Inputs) -> dict[str, Tensor]:
    """Low-precision copies, where the case has them, as a pass of their own."""
    for copies, source in (("copies", "params"), ("teacher_copies", "teacher")):
        if copies in inputs:
            torch._foreach_copy_(inputs[copies], inputs[source])
    return _state(inputs)


def _state(inputs: Inputs) -> dict[str, Tensor]:
    """Everything the step writes, by name."""
    written = (name for name in ("params", "teacher", "copies", "teacher_copies") if name in inputs)
    return {f"{name}[{i}]": tensor.detach() for name in written for i, tensor in enumerate(inputs[name])}
