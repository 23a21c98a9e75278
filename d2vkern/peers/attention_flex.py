"""multimask_attention on torch.nn.attention.flex_attention: the bias is a score_mod, no [N,H,S,S] on a GPU.

On a GPU inductor compiles the call into Triton kernels, once per kind of call (dynamic in N and S from the
second shape on); on a CPU Dynamo traces it and plain operators run, scores materialised, forward only.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from d2vkern import _costs
from d2vkern._nvtx import op_range

from ._bias import head_factor, qkv_of, real_keys, zero_padded_rows

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod | None, scale: float | None) -> Tensor:
    return flex_attention(q, k, v, score_mod=score_mod, scale=scale)


@cache
def _compiled(device: str, *kind: Any) -> Any:
    """`_attend` compiled, with a code object of its own for each kind of call: Dynamo counts how often it
    compiles by code object, and after a few times gives up."""
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__)
    return torch.compile(own, fullgraph=True, backend="inductor" if device == "cuda" else "eager")


def _alibi(positions: Tensor, factor: Tensor) -> ScoreMod:
    """Minus factor [H] times the distance of positions [N,S], 0 where one of them is an extra token."""

    def score_mod(score: Tensor, n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query, key = positions[n, i], positions[n, j]
        distance = torch.where((query >= 0) & (key >= 0), (query - key).abs(), 0)
        return score - factor[h] * distance

    return score_mod


def _within(keys: Tensor) -> ScoreMod:
    """-inf from key number keys [N] on."""

    def score_mod(score: Tensor, n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < keys[n], score, float("-inf"))

    return score_mod


def _both(first: ScoreMod, second: ScoreMod) -> ScoreMod:
    def score_mod(score: Tensor, n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return second(first(score, n, h, i, j), n, h, i, j)

    return score_mod


def _cost(qkv: Tensor, positions: Tensor | None = None, *_: Any, **__: Any) -> _costs.Cost:
    return _costs.attention(qkv, positions, grad=())


@op_range("attention/fwd/flex", _cost)
def multimask_attention(
    qkv: Tensor,
    positions: Tensor | None = None,
    slopes: Tensor | None = None,
    alibi_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    padded_rows: str = "zero",
) -> Tensor:
    n, s, _, h, d = qkv.shape
    if qkv.numel() == 0:
        return qkv.reshape(n, s, 3 * h * d)[:, :, : h * d]
    if qkv.device.type == "cpu":
        qkv = qkv.detach()  # flex_attention looks at requires_grad even where no gradient is recorded
    score_mod = None
    if slopes is not None and positions is not None:
        score_mod = _alibi(positions, head_factor(slopes, alibi_scale).detach())
    if lengths is not None:
        within = _within(real_keys(lengths, s))
        score_mod = within if score_mod is None else _both(score_mod, within)
    q, k, v = qkv_of(qkv, lengths, padded_rows).permute(2, 0, 3, 1, 4)  # [N,H,S,Dh] each
    attend = _attend
    if not torch.compiler.is_compiling():
        kind = qkv.dtype, h, d, slopes is None, lengths is None, softmax_scale, torch.is_grad_enabled()
        attend = _compiled(qkv.device.type, *kind)
    out = attend(q, k, v, score_mod, softmax_scale)
    return zero_padded_rows(out.transpose(1, 2).flatten(2), lengths, padded_rows)
