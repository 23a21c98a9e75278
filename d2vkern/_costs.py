"""Bytes and FLOPs of every op by formula: what the contract of the op says must move, whatever the backend.

Each tensor counts where it must be read or written: inputs and outputs once, what backward needs from the
forward when it is written and when it is read. FLOPs are those of matrix products and convolutions, two per
multiply-add, nothing made anew in backward; norms, GELU, softmax and optimizers count none.

A function per op, called with the arguments of its implementation. `grad` is an autograd.Function's
`needs_input_grad`, one bool per argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Needs = tuple[bool, ...]


class Cost(NamedTuple):
    """Work of one call; `backward` is (bytes, FLOPs) of the backward call that belongs to it."""

    bucket: str
    """shape, each size rounded up to a power of two"""
    bytes: int = 0
    flops: int = 0
    backward: tuple[int, int] = (0, 0)

    def of_backward(self) -> Cost:
        """The backward call's own work."""
        return Cost(self.bucket, *self.backward)


def bucket(**sizes: int) -> str:
    """`bucket(N=12, D=768)` is "N16 D1024"."""
    return " ".join(f"{name}{1 << (size - 1).bit_length() if size else 0}" for name, size in sizes.items())


def masks(
    ids: Tensor,
    clones: int,
    grid: Sequence[int],
    block: Sequence[int],
    centres: int,
    target: int,
    keep_chosen: bool,
    **_: Any,
) -> Cost:
    """All three samplers: mask, slot and kept positions are written."""
    rows, cells = ids.shape[0] * clones, grid[0] * grid[1]
    kept = target if keep_chosen else cells - target
    return Cost(bucket(N=rows, T=cells), 8 * ids.shape[0] + rows * (5 * cells + 4 * kept))


def gather(
    x: Tensor,
    ids_keep: Tensor,
    clones: int,
    extra: Tensor | None,
    positions: Tensor | None,
    per_mask: Tensor | None,
    grad: Needs = (),
) -> Cost:
    tokens, width = x.shape[1:]
    rows, kept = ids_keep.shape
    vector = width * x.element_size()
    seen = rows * (kept + _rows(extra)) * vector
    added = (_rows(extra) + _rows(positions)) * vector
    forward = x.numel() * x.element_size() + seen + added + 4 * rows * kept
    backward = seen + x.numel() * x.element_size() + 4 * rows * tokens
    if per_mask is not None:
        forward += rows * kept * vector
        backward += rows * tokens * vector
    return Cost(bucket(N=rows, T=tokens, K=kept, D=width), forward, 0, (backward, 0))


def gather_bwd(dout: Tensor, slot: Tensor, clones: int, extras: int, needs: Sequence[bool]) -> Cost:
    """`gather`'s backward from what it is given; needs: gradients of x, extra, positions, per_mask."""
    (rows, tokens), (_, seen, width) = slot.shape, dout.shape
    gradients = (rows // clones + rows * needs[3]) * tokens * width * dout.element_size()
    moved = _nbytes(dout) + gradients + 4 * rows * tokens
    return Cost(bucket(N=rows, T=tokens, K=seen - extras, D=width), moved)


def scatter(x: Tensor, kept: int, tokens: int) -> Cost:
    rows, seen, width = x.shape
    vector = width * x.element_size()
    backward = 2 * rows * seen * vector + 4 * rows * kept
    forward = rows * (seen + tokens) * vector + 4 * rows * tokens
    return Cost(bucket(N=rows, T=tokens, K=kept, D=width), forward, 0, (backward, 0))


def scatter_bwd(dout: Tensor, ids_keep: Tensor, extras: int) -> Cost:
    """`scatter`'s backward from what it is given."""
    rows, kept = ids_keep.shape
    x = dout.new_empty((rows, extras + kept, dout.shape[2]), device="meta")
    return scatter(x, kept, dout.shape[1]).of_backward()


def mask_token_bwd(dout: Tensor, slot: Tensor) -> Cost:
    """At most: how many places are masked is not known here."""
    return Cost(_tokens_bucket(dout), _nbytes(dout) + 4 * slot.numel())


def attention(qkv: Tensor, positions: Tensor | None, *_: Any, grad: Needs) -> Cost:
    n, s, heads, width = (qkv.shape[dim] for dim in (0, 1, 3, 4))
    part = n * s * heads * width * qkv.element_size()
    places = 0 if positions is None else 4 * n * s
    flops = 4 * n * s * s * heads * width
    return Cost(bucket(N=n, S=s, H=heads, Dh=width), 4 * part + places, flops, (8 * part + places, 2 * flops))


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    residual: bool,
    eps: float,
    masked: Tensor | None,
    clones: int,
    index: Tensor | None,
    grad: Needs,
) -> Cost:
    """x [N,H,W,C], weight [O,C/groups,kh,kw]; with `index` that many outputs, with `masked` clones of x."""
    height, length = x.shape[1:3]
    places = x.shape[0] * (clones if masked is not None else 1) * height * length
    places = places if index is None else index.numel()
    item = x.element_size()
    read, written = x.numel() * item, places * weight.shape[0] * item
    weights = _nbytes(weight, bias)
    flops = 2 * places * weight.numel()
    return Cost(
        bucket(places=places, C=x.shape[-1], O=weight.shape[0], k=math.prod(weight.shape[2:])),
        read + weights + written * (1 + any(grad)),  # the convolution's output is kept for backward
        flops,
        (read * (1 + grad[0]) + 2 * weights + 2 * written, flops * (grad[0] + grad[1])),
    )


def conv_stem(
    x: Tensor, weight: Tensor, stride: int, norm_weight: Tensor, norm_bias: Tensor, eps: float, grad: Needs
) -> Cost:
    (samples, length, channels), (width, _, kernel) = x.shape, weight.shape
    frames = (length - kernel) // stride + 1
    read, written = x.numel() * x.element_size(), samples * frames * width * x.element_size()
    weights = _nbytes(weight, norm_weight, norm_bias)
    flops = 2 * samples * frames * weight.numel()
    return Cost(
        bucket(B=samples, T=length, C=channels, O=width, k=kernel),
        read + weights + written * (1 + any(grad)),
        flops,
        (read * (1 + grad[0]) + 2 * weights + 2 * written, flops * (grad[0] + grad[1])),
    )


def residual_norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    update_bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    prenorm: bool,
    *_: Any,
    grad: Needs,
) -> Cost:
    """The sum is kept for backward; where nothing is dropped x and update share one gradient.

    Of update only the dtype counts. It is read again for gamma's gradient."""
    size, update_size = (x.numel() * tensor.element_size() for tensor in (x, update))
    affine = _nbytes(weight, bias, update_bias, gamma)
    forward = size * (2 + (prenorm or any(grad))) + update_size + affine
    own_gradient = keep is not None or gamma is not None or update.dtype != x.dtype
    updates = own_gradient + (gamma is not None)
    return Cost(
        bucket(rows=x.numel() // max(1, x.shape[-1]), D=x.shape[-1]),
        forward,
        0,
        (size * (3 + prenorm) + updates * update_size + 2 * affine, 0),
    )


def mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *_: Any, grad: Needs
) -> Cost:
    """The activation passes from one product to the next; the pre-activation is kept for backward."""
    (hidden, width), out = w1.shape, w2.shape[0]
    rows, item = x.numel() // max(1, width), x.element_size()
    weights = _nbytes(w1, b1, w2, b2)
    first, second = 2 * rows * w1.numel(), 2 * rows * w2.numel()
    return Cost(
        bucket(rows=rows, D=width, F=hidden, O=out),
        rows * (width + (2 + any(grad)) * hidden + out) * item + weights,
        first + second,
        (
            rows * (2 * width + 4 * hidden + 2 * out) * item + 2 * weights,
            first * (grad[0] + grad[1]) + 2 * second,
        ),
    )


def linear(x: Tensor, w: Tensor, b: Tensor | None, *_: Any, grad: Needs) -> Cost:
    (out, width), item = w.shape, x.element_size()
    rows, weights = x.numel() // max(1, width), _nbytes(w, b)
    flops = 2 * rows * w.numel()
    return Cost(
        bucket(rows=rows, D=width, O=out),
        rows * (width + out) * item + weights,
        flops,
        (rows * (2 * width + 2 * out) * item + 2 * weights, flops * (grad[0] + grad[1])),
    )


def dropout(shape: tuple[int, ...], *_: Any) -> Cost:
    """A byte per decision."""
    return Cost(bucket(values=math.prod(shape)), math.prod(shape))


def targets(accumulator: Tensor | None, layer: Tensor, norm: str | None) -> Cost:
    """One layer into the running sum."""
    wide = max(4, layer.element_size())
    total = layer.numel() * wide * (1 if accumulator is None else 2)
    return Cost(_tokens_bucket(layer), layer.numel() * layer.element_size() + total)


def targets_finish(accumulator: Tensor, layers: int, final: str | None) -> Cost:
    return Cost(_tokens_bucket(accumulator), 2 * _nbytes(accumulator))


def loss(pred: Tensor, target: Tensor, ids_mask: Tensor, *settings: Any, grad: Needs) -> Cost:
    """The gradient is made in the forward; what backward does to it can cost nothing."""
    rows, masked = ids_mask.shape
    compared = rows * masked * pred.shape[-1] * pred.element_size()
    gradient = _nbytes(pred) if grad[0] else 0
    return Cost(
        bucket(N=rows, masked=masked, D=pred.shape[-1]),
        compared + gradient + _nbytes(target) + 4 * rows * masked,
    )


def ema(
    teacher: Sequence[Tensor], student: Sequence[Tensor], decay: Any, copies: Sequence[Tensor | None]
) -> Cost:
    moved = 2 * _nbytes(*teacher) + _nbytes(*student) + _nbytes(*copies)
    return Cost(bucket(tensors=len(teacher), values=sum(t.numel() for t in teacher)), moved)


def adamw_ema(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Any = None,
    *,
    teachers: Sequence[Tensor | None],
    ema_decay: Any = 0.0,
    copies: Sequence[Tensor | None],
    teacher_copies: Sequence[Tensor | None],
    **_: Any,
) -> Cost:
    """AdamW, and the teachers in the same pass."""
    moved = 2 * _nbytes(*params, *exp_avgs, *exp_avg_sqs) + _nbytes(*grads) + _nbytes(*copies)
    if ema_decay is not None:
        moved += 2 * _nbytes(*teachers) + _nbytes(*teacher_copies)
    return Cost(bucket(tensors=len(params), values=sum(p.numel() for p in params)), moved)


def grad_norm(grads: list[Tensor]) -> Cost:
    return Cost(bucket(tensors=len(grads), values=sum(g.numel() for g in grads)), _nbytes(*grads))


def _rows(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[0]


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _tokens_bucket(x_BTD: Tensor) -> str:
    return bucket(B=x_BTD.shape[0], T=x_BTD.shape[1], D=x_BTD.shape[2])
