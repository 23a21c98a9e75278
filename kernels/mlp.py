"""Triton gelu_mlp: pre = x w1' + b1, act = k gelu(pre) / (1 - p), y = act w2' + b2.

    dact = dy w2;  dpre = dact k / (1 - p) gelu'(pre);  dw2 = dy' act;  dw1 = dpre' x;  dx = dpre w1
    db1, db2 = column sums of dpre and dy;  k: 0 for dropped elements, else 1

The products are the library's, with the biases added in their epilogues in fp32: added in our pass they would
meet a product that is rounded already, and a bias that nearly cancels it would show that rounding. One
elementwise kernel stands between the products each way. In a matmul's epilogue GELU was a tie on paper. The
whole forward and the whole backward are one registered op each: products, casts of the weights and our
kernels lie in one NVTX range, and nothing of size [rows, F] lives longer than written here.

Forward: a program takes BLOCK elements of pre, flat. Without gradients act is written over pre. Backward: a
program takes BLOCK_F columns of one share of the rows, recomputes act for dw2, writes dpre over dact, and
keeps the column sums of dpre in registers. Programs past the last hidden column sum dy's columns: db2 in the
same launch. A second kernel adds the shares' sums. The number of shares follows from the shape, so that the
bits of the bias gradients do not depend on the GPU (unless its entry in tuned.json says otherwise): 16 rows
each at least, and 768 programs in all, six to each of 132 SMs at once.

Roundings are eager's, but act and dpre are rounded once, when stored. GELU and its derivative share an
exponential (_common.py). `linear` is eager's: the library's product, and nothing beside it to fuse.

Elementwise bytes, in passes over [rows, F] in x's dtype:
    forward    pre read, act written: 2; with the products' write and read 4, where _costs.mlp has 3 (in a
               perfect epilogue pre would not be read again)
    backward   pre and dact read, dpre and act written: 4, the least without an epilogue; and dy for db2
    partials   2 (F + O) fp32 for each share, written and read

At 40,960 x 768-3072-768 in bf16 that is 503 MB forward, 1,007 + 63 + 1.6 MB backward: 117 and 249 us at 4.3
TB/s, beside 387 and 773 GFLOP: 490 and 980 us at 790 TFLOP/s.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern import _costs
from d2vkern._derivatives import first_order
from d2vkern._library import define, gradients_like, needed
from d2vkern._nvtx import op_range
from d2vkern.kernels._column_sums import column_sums, new_partials, parts_of
from d2vkern.kernels._common import gelu, gelu_and_grad, tanh_gate
from d2vkern.kernels._dropout import draw_seed, dropout_scale, keep_span, keep_tile, threshold
from d2vkern.kernels._launch import launch
from d2vkern.kernels._tuning import Config, choose, power_of_two_bucket
from d2vkern.reference.mlp import linear as linear

_PROGRAMS = 768


@triton.jit(do_not_specialize=["dropout_threshold"])
def mlp_fwd_kernel(
    pre_ptr,  # [size]
    act_ptr,  # [size], may be pre
    seed_ptr,  # [] int64, or None
    size,
    scale,
    dropout_threshold,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
    act = pre * tanh_gate(pre)[0] if TANH else gelu(pre)
    if seed_ptr is not None:
        keep = keep_span(program * (BLOCK // 8), tl.load(seed_ptr), dropout_threshold, BLOCK)
        act *= tl.where(keep, tl.full((), scale, tl.float32), 0.0)
    tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "dropout_threshold"])
def mlp_bwd_kernel_hidden(
    dact_ptr,  # [rows, F], or None: no dpre
    pre_ptr,  # [rows, F], or None: db2 alone
    dpre_ptr,  # [rows, F], may be dact; None as dact
    act_ptr,  # [rows, F] or None
    dy_ptr,  # [rows, O], or None: no db2
    partials_ptr,  # [shares, (F if DB1) + (O if dy)] fp32, maybe empty
    seed_ptr,  # [] int64, or None
    rows,
    dy_stride_row,
    scale,
    dropout_threshold,
    F: tl.constexpr,
    OUT: tl.constexpr,
    DB1: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    HIDDEN_TILES: tl.constexpr = 0 if pre_ptr is None else (F + BLOCK_F - 1) // BLOCK_F
    SUMS: tl.constexpr = (F if DB1 else 0) + (0 if dy_ptr is None else OUT)
    tile, share, shares = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = (rows * share // shares).to(tl.int32)
    last = (rows * (share + 1) // shares).to(tl.int32)
    # [BLOCK_R, BLOCK_F]
    total = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    if tile < HIDDEN_TILES:
        if pre_ptr is not None:
            seed = 0 if seed_ptr is None else tl.load(seed_ptr)
            # [1, BLOCK_F]
            column = (tile * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
            for start in range(first, last, BLOCK_R):
                # [BLOCK_R]
                row = start + tl.arange(0, BLOCK_R)
                row64 = row.to(tl.int64)
                at = row64[:, None] * F + column
                inside = (row < last)[:, None] & (column < F)
                pre = tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32)
                act, slope = gelu_and_grad(pre, TANH)
                if seed_ptr is not None:
                    keep = keep_tile(row64, tile * BLOCK_F, seed, dropout_threshold, F, BLOCK_F)
                    factor = tl.where(keep, tl.full((), scale, tl.float32), 0.0)
                    act *= factor
                    slope *= factor
                if act_ptr is not None:
                    tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=inside)
                if dact_ptr is not None:
                    dpre = tl.load(dact_ptr + at, mask=inside, other=0.0).to(tl.float32) * slope
                    tl.store(dpre_ptr + at, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
                    total += dpre
            if DB1:
                _store_sums(partials_ptr + share * SUMS, total, tile, F, BLOCK_F)
    else:
        if dy_ptr is not None:
            tile -= HIDDEN_TILES
            column = (tile * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
            for start in range(first, last, BLOCK_R):
                row = start + tl.arange(0, BLOCK_R)
                at = row.to(tl.int64)[:, None] * dy_stride_row + column
                inside = (row < last)[:, None] & (column < OUT)
                total += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            _store_sums(partials_ptr + share * SUMS + (F if DB1 else 0), total, tile, OUT, BLOCK_F)


@triton.jit
def _store_sums(sums_ptr, total, tile, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr):
    """Column sums of [BLOCK_R, BLOCK_F], tile number `tile` of a row of WIDTH."""
    column = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    tl.store(sums_ptr + column, tl.sum(total, 0), mask=column < WIDTH)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias in a's dtype, [m, k] by [k, n]. Autocast leaves the `out=` forms alone."""
    out = a.new_empty(a.shape[0], b.shape[1])
    if bias is None:
        return torch.mm(a, b, out=out)
    return torch.addmm(bias.to(a.dtype), a, b, out=out)


def _flat(x: Tensor) -> Tensor:
    """[rows, last]"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _forward_outputs(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, save = rest
    rows = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], w2.shape[0]), x.new_empty((rows, w1.shape[0]) if save else (0, 0))


def _forward_cost(*arguments: Any) -> _costs.Cost:
    *tensors, _seed, _p, _tanh, save = arguments
    return _costs.mlp(*tensors, grad=(save, save))


def _forward_config(pre: Tensor) -> Config:
    vector = 16 // pre.element_size()
    candidates = [
        {"BLOCK": 32 * warps * vectors * vector, "num_warps": warps}
        for warps, vectors in ((4, 2), (4, 4), (8, 2), (4, 1))
    ]
    bucket = power_of_two_bucket(size=pre.numel())
    return choose("mlp_fwd_kernel", f"{bucket} bytes{pre.element_size()}", candidates)


@op_range("mlp/fwd/triton", _forward_cost)
def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    tanh: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the pre-activation for backward, [rows, F], which is empty unless `save`."""
    pre = _product(_flat(x), w1.to(x.dtype).t(), b1)
    act = torch.empty_like(pre) if save else pre
    config = _forward_config(pre)
    launch(
        mlp_fwd_kernel,
        (triton.cdiv(pre.numel(), config["BLOCK"]),),
        pre,
        act,
        seed,
        pre.numel(),
        dropout_scale(dropout_p),
        threshold(dropout_p),
        TANH=tanh,
        **config,
    )
    y = _product(act, w2.to(x.dtype).t(), b2)
    return y.view(*x.shape[:-1], w2.shape[0]), pre if save else x.new_empty(0, 0)


def _backward_outputs(dy: Tensor, x: Tensor, pre: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *weights, _seed, _p, _tanh, needs = rest
    return gradients_like((x, *weights), needs)


def _backward_cost(dy: Tensor, x: Tensor, pre: Tensor, *rest: Any) -> _costs.Cost:
    *tensors, _seed, _p, _tanh, needs = rest
    return _costs.mlp(x, *tensors, grad=tuple(needs)).of_backward()


@op_range("mlp/bwd/triton", _backward_cost)
def _backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    tanh: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1, w2 and b2; those that `needs` does not ask for are empty."""
    dys, dx, dw1, dw2 = _flat(dy), None, None, None
    db1 = b1.new_empty(b1.shape) if b1 is not None and needs[2] else None
    db2 = b2.new_empty(b2.shape) if b2 is not None and needs[4] else None
    dpre, act = _hidden_gradients(
        dys, pre, w2, seed, dropout_p, tanh, need_dpre=any(needs[:3]), need_act=needs[3], db1=db1, db2=db2
    )
    if act is not None:
        dw2 = _product(dys.t(), act).to(w2.dtype)
        del act
    if dpre is not None and needs[1]:
        dw1 = _product(dpre.t(), _flat(x)).to(w1.dtype)
    if dpre is not None and needs[0]:
        dx = _product(dpre, w1.to(x.dtype)).view(x.shape)
    return tuple(x.new_empty(0) if out is None else out for out in (dx, dw1, db1, dw2, db2))


def _backward_config(pre: Tensor, block: int) -> Config:
    (rows, hidden), vector = pre.shape, 16 // pre.element_size()
    candidates = [
        {"BLOCK_R": 32 * warps * vectors * vector // block, "num_warps": warps}
        for warps, vectors in ((4, 2), (4, 1), (8, 2), (8, 1))
    ]
    bucket = f"{power_of_two_bucket(rows=rows)} F{hidden} bytes{pre.element_size()}"
    return choose("mlp_bwd_kernel_hidden", bucket, candidates)


def _hidden_gradients(
    dy: Tensor,
    pre: Tensor,
    w2: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    tanh: bool,
    *,
    need_dpre: bool,
    need_act: bool,
    db1: Tensor | None,
    db2: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dpre and act, both [rows, F], as needed; db1 and db2 are written where given. dy is [rows, O]."""
    (rows, hidden), outs = pre.shape, dy.shape[1]
    dpre = _product(dy, w2.to(dy.dtype)) if need_dpre else None
    act = torch.empty_like(pre) if need_act else None
    if db2 is not None and dy.stride(1) != 1:
        dy = dy.contiguous()
    # A warp's 16-byte loads cover a row of the block.
    block = min(512 // pre.element_size(), triton.next_power_of_2(max(1, hidden)))
    tiles = triton.cdiv(hidden, block) if need_dpre or need_act else 0
    if db2 is not None:
        tiles += triton.cdiv(outs, block)
    shares = min(parts_of(rows, least=16), max(1, _PROGRAMS // max(1, tiles)))
    partials = new_partials(pre, shares, (db1, db2))
    launch(
        mlp_bwd_kernel_hidden,
        (tiles, shares),
        dpre,
        pre if need_dpre or need_act else None,
        dpre,
        act,
        None if db2 is None else dy,
        partials,
        seed,
        rows,
        dy.stride(0),
        dropout_scale(dropout_p),
        threshold(dropout_p),
        F=hidden,
        OUT=outs,
        DB1=db1 is not None,
        TANH=tanh,
        BLOCK_F=block,
        **_backward_config(pre, block),
    )
    if partials.shape[1]:
        column_sums(partials, (db1, db2))
    return dpre, act


_PARAMETERS = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? seed, float dropout_p, bool tanh"
_forward_op = define(
    f"mlp_fwd(Tensor x, {_PARAMETERS}, bool save) -> (Tensor, Tensor)", _forward, _forward_outputs
)
_backward_op = define(
    f"mlp_bwd(Tensor dy, Tensor x, Tensor pre, {_PARAMETERS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        tanh: bool,
    ) -> Tensor:
        y, pre = _forward_op(x, w1, b1, w2, b2, seed, dropout_p, tanh, True)
        ctx.save_for_backward(x, pre, w1, b1, w2, b2, seed)
        ctx.settings = dropout_p, tanh
        return y

    @staticmethod
    @first_order("gelu_mlp")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:5])
        gradients = _backward_op(dy, *ctx.saved_tensors, *ctx.settings, needs)
        return *needed(gradients, needs), None, None, None


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    approximate: str = "none",
) -> Tensor:
    source = draw_seed(seed, x.device) if dropout_p else None
    tensors, settings = (x, w1, b1, w2, b2, source), (dropout_p, approximate == "tanh")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _GeluMLP.apply(*tensors, *settings)
    return _forward_op(*tensors, *settings, False)[0]
