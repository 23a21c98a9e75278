"""Calls that no preset's benchmark makes but that run other code in the kernels: further cases for the gate.

Seeds and decays that live on the device (as in a step replayed by a CUDA graph), norms of other recipes,
dropout, missing arguments, first layers, rows longer than a program holds. Each is a base preset's case with
another call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import d2vkern
from benchmarks import (
    bench_adamw_ema,
    bench_attention,
    bench_conv_block,
    bench_ema,
    bench_gather,
    bench_loss,
    bench_masks,
    bench_mlp,
    bench_residual_norm,
    bench_targets,
)
from benchmarks.cases import Case, Inputs, Outputs, tensors
from d2vkern.kernels._taps import Places, Taps
from d2vkern.kernels._tuning import forced
from d2vkern.kernels.conv_block_fwd import OWNER, owner_bucket

_Call = Callable[[Inputs, str | None], Outputs]


def variants(stem: str, dtype: torch.dtype) -> list[Case]:
    """Cases of an op beyond the benchmarks'; none for an op that lists none."""
    return [
        replace(case, name=name, call=call, leaves=case.leaves if differentiable else ())
        for name, (case, call, differentiable) in _VARIANTS.get(stem, lambda dtype: {})(dtype).items()
    ]


_Variants = dict[str, tuple[Case, _Call, bool]]


def _scalar(inputs: Inputs, value: float, dtype: torch.dtype) -> Tensor:
    """A 0-dim tensor beside the inputs."""
    return torch.full((), value, dtype=dtype, device=next(tensors(inputs)).device)


def _seed(inputs: Inputs) -> Tensor:
    return _scalar(inputs, 1, torch.int64)


def _masks(dtype: torch.dtype) -> _Variants:
    case = bench_masks.cases("audio_base", "gpu", dtype)[0]

    def on_device(inputs: Inputs, backend: str | None) -> Outputs:
        seed = _seed(inputs)
        plan = d2vkern.span_mask(
            inputs["ids"], 8, 600, prob=0.5, length=5, seed=seed, epoch=seed, backend=backend
        )
        return {"mask": plan.mask}

    def long_rows(inputs: Inputs, backend: str | None) -> Outputs:
        return {"mask": d2vkern.span_mask(inputs["ids"], 1, 50_000, prob=0.5, length=5, backend=backend).mask}

    return {"seed on the device": (case, on_device, False), "50,000 tokens": (case, long_rows, False)}


def _gather(dtype: torch.dtype) -> _Variants:
    gather, scatter = bench_gather.cases("image_base", "gpu", dtype)

    def on_device(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.scatter_tokens(inputs["x"], inputs["plan"], 0.1, _seed(inputs), backend=backend)

    def silent(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.scatter_tokens(inputs["x"], inputs["plan"], 0.0, 1, backend=backend)

    def tokens(inputs: Inputs, backend: str | None) -> Outputs:
        token = inputs["x"].new_empty(inputs["x"].shape[2])
        if inputs["x"].requires_grad:
            token.requires_grad_()
        return d2vkern.scatter_tokens(
            inputs["x"], inputs["plan"], mask_token=token, keep_extra=True, backend=backend
        )

    trained = replace(gather, leaves=("x", "extra", "positions"))
    return {
        "trained positions": (trained, gather.call, True),
        "seed on the device": (scatter, on_device, True),
        "no noise": (scatter, silent, True),
        "mask token, extra tokens kept": (scatter, tokens, True),
    }


def _attention(dtype: torch.dtype) -> _Variants:
    """Head widths 64 and 128 (no preset has that), in each kind of tile: with everything, and plain."""
    case = bench_attention.cases("audio_base", "gpu", dtype)[0]
    plain = replace(case, leaves=("qkv",))

    def make(tokens: int, width: int, device: torch.device) -> Inputs:
        inputs = {"qkv": torch.empty(8, tokens, 3, 12, width, dtype=dtype, device=device)}
        inputs |= {name: torch.empty(12, device=device) for name in ("slopes", "alibi_scale")}
        inputs["positions"] = torch.empty(8, tokens, dtype=torch.int32, device=device)
        return inputs | {"lengths": torch.empty(8, dtype=torch.int32, device=device)}

    def everything(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.multimask_attention(**inputs, dropout_p=0.1, seed=1, backend=backend)

    def nothing(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.multimask_attention(inputs["qkv"], backend=backend)

    found: _Variants = {}
    for width in (64, 128):
        for tokens in (15, 30, 41, 300):
            found[f"everything, {tokens} tokens of {width}"] = (
                replace(case, make=partial(make, tokens, width)), everything, True,
            )  # fmt: skip
        found[f"nothing, 300 tokens of {width}"] = (
            replace(plain, make=partial(make, 300, width)), nothing, True,
        )  # fmt: skip
    return found


def _conv_block(dtype: torch.dtype) -> _Variants:
    audio = bench_conv_block.cases("audio_base", "gpu", dtype)[0]
    text, picked = bench_conv_block.cases("text_base", "gpu", dtype)[:2]

    def first(inputs: Inputs, backend: str | None) -> Outputs:
        """The layer before: twice the channels in."""
        x, weight = (torch.cat([inputs[name]] * 2, dim) for name, dim in (("x", 2), ("weight", 1)))
        return d2vkern.conv_block_1d(x, weight, inputs["bias"], 16, backend=backend)

    def even(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.conv_block_1d(inputs["x"], inputs["weight"][..., :6], None, 16, backend=backend)

    def added(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.conv_block_1d(**inputs, residual=True, backend=backend)

    def owned(inputs: Inputs, backend: str | None) -> Outputs:
        """A program has whole rows, which 16 bits prefer only where that was measured."""
        x, weight = inputs["x"], inputs["weight"].unsqueeze(2)
        places = Places(x.shape[0], 1, x.shape[1])
        bucket = owner_bucket(Taps.of(weight, 16), places, x.element_size())
        with forced(OWNER, bucket, {"OWNER": 1}):
            return d2vkern.conv_block_1d(**inputs, groups=16, backend=backend)

    return {
        "first layer": (audio, first, True),
        "whole rows": (audio, owned, True),
        "even kernel, no bias": (replace(audio, leaves=("x", "weight")), even, True),
        "evaluation": (audio, audio.call, False),
        "dense, residual": (text, added, True),
        "masked places, residual": (picked, added, True),
    }


def _residual_norm(dtype: torch.dtype) -> _Variants:
    case = bench_residual_norm.cases("image_base", "gpu", dtype)[0]

    def dropped(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.residual_norm(
            **inputs, update_bias=inputs["bias"], dropout_p=0.1, drop_path_p=0.1, seed=1, backend=backend
        )

    def plain(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.residual_norm(inputs["x"], inputs["update"], backend=backend)

    def low_update(inputs: Inputs, backend: str | None) -> Outputs:
        inputs = inputs | {"x": inputs["x"].float()}
        z, y = d2vkern.residual_norm(**inputs, prenorm=True, backend=backend)
        return {"z": z, "y": y}

    def make_scaled(device: torch.device) -> Inputs:
        inputs = case.make(device)
        return inputs | {"gamma": inputs["bias"].clone()}

    def scaled(inputs: Inputs, backend: str | None) -> Outputs:
        z, y = d2vkern.residual_norm(**inputs, prenorm=True, drop_path_p=0.1, seed=1, backend=backend)
        return {"z": z, "y": y}

    two = replace(case, leaves=("x", "update"))
    layer_scale = replace(case, make=make_scaled, leaves=(*case.leaves, "gamma"))
    return {
        "dropout, drop path, bias": (case, dropped, True),
        "no affine": (two, plain, True),
        "prenorm, fp32 stream": (case, low_update, True),
        "prenorm, LayerScale, drop path": (layer_scale, scaled, True),
    }


def _mlp(dtype: torch.dtype) -> _Variants:
    case = bench_mlp.cases("image_base", "gpu", dtype)[0]

    def dropped(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.gelu_mlp(**inputs, dropout_p=0.1, seed=1, backend=backend)

    def no_biases(inputs: Inputs, backend: str | None) -> Outputs:
        x, w1, w2 = (inputs[name] for name in ("x", "w1", "w2"))
        return d2vkern.gelu_mlp(x, w1, None, w2, None, backend=backend)

    def tanh(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.gelu_mlp(**inputs, approximate="tanh", backend=backend)

    weights = replace(case, leaves=("x", "w1", "w2"))
    return {
        "dropout": (case, dropped, True),
        "no biases": (weights, no_biases, True),
        "tanh": (case, tanh, True),
        "teacher": (case, case.call, False),
    }


def _targets(dtype: torch.dtype) -> _Variants:
    case = bench_targets.cases("image_base", "gpu", dtype)[0]

    def normed(norm: Any, final: Any) -> _Call:
        return lambda inputs, backend: d2vkern.layer_targets(inputs["layers"], norm, final, backend=backend)

    kinds = (("batch", None), ("layer", "instance"), (None, None))
    return {f"{norm}, {final}": (case, normed(norm, final), False) for norm, final in kinds}


def _loss(dtype: torch.dtype) -> _Variants:
    masked, everywhere = bench_loss.cases("image_base", "gpu", dtype)

    def smooth(inputs: Inputs, backend: str | None) -> Outputs:
        return d2vkern.masked_regression_loss(**inputs, beta=0.25, backend=backend)._asdict()

    def padded(inputs: Inputs, backend: str | None) -> Outputs:
        plan = inputs["plan"]
        kept = plan.slot.new_empty(plan.slot.shape[:1])
        given = {**inputs, "plan": replace(plan, kept_lengths=kept, padded_ids_mask=plan.ids_mask)}
        return d2vkern.masked_regression_loss(**given, backend=backend)._asdict()

    return {
        "padded rows, masked places": (masked, padded, True),
        "padded rows, all places": (everywhere, padded, True),
        "smooth, masked places": (masked, smooth, True),
        "smooth, all places": (everywhere, smooth, True),
        "evaluation": (masked, masked.call, False),
    }


def _ema(dtype: torch.dtype) -> _Variants:
    case = bench_ema.cases("image_tiny", "gpu", dtype)[-1]

    def on_device(inputs: Inputs, backend: str | None) -> Outputs:
        decay = _scalar(inputs, 0.999, torch.float64)
        d2vkern.ema_update_(**inputs, decay=decay, backend=backend)
        return {}

    def low_student(inputs: Inputs, backend: str | None) -> Outputs:
        students = [s.to(dtype) if i % 2 else s for i, s in enumerate(inputs["student"])]
        d2vkern.ema_update_(inputs["teacher"], students, 0.999, backend=backend)
        return {}

    return {"decay on the device": (case, on_device, False), "mixed students": (case, low_student, False)}


def _adamw_ema(dtype: torch.dtype) -> _Variants:
    case = bench_adamw_ema.cases("image_tiny", "gpu", dtype)[-1]

    def capturable(inputs: Inputs, backend: str | None) -> Outputs:
        for p, g in zip(inputs["params"], inputs["grads"], strict=True):
            p.grad = g
        optimizer = d2vkern.AdamWEMA(
            inputs["params"],
            _scalar(inputs, 1e-3, torch.float32),
            eps_mode="fairseq",
            teacher=inputs["teacher"],
            copies=inputs.get("copies"),
            capturable=True,
            backend=backend,
        )
        one = _scalar(inputs, 1.0, torch.float32)
        optimizer.step(clip_factor=one, ema_decay=one)
        return {}

    def alone(inputs: Inputs, backend: str | None) -> Outputs:
        for p, g in zip(inputs["params"], inputs["grads"], strict=True):
            p.grad = g
        d2vkern.AdamWEMA(inputs["params"], backend=backend).step()
        return {}

    return {"capturable, fairseq": (case, capturable, False), "without teacher": (case, alone, False)}


_VARIANTS: dict[str, Callable[[torch.dtype], _Variants]] = {
    "masks": _masks,
    "gather": _gather,
    "attention": _attention,
    "conv_block": _conv_block,
    "residual_norm": _residual_norm,
    "mlp": _mlp,
    "targets": _targets,
    "loss": _loss,
    "ema": _ema,
    "adamw_ema": _adamw_ema,
}
