"""AdamW, the teacher's moving average and low-precision copies of both: many tensors, one launch, one pass.

With t the step, g the gradient times the clip factor and bc_i = 1 - beta_i^t:

    m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
    torch:     p -= lr weight_decay p + lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)
    fairseq:   the same with eps / sqrt(bc2) for eps
    teacher += (1 - decay) (p - teacher);   copies = round(p), round(teacher)

Layout and dtypes: `_table.py`; parameters, moments and teachers are fp32 as a rule, copies fp32, fp16 or
bf16, and each of the last three is there in some rows and not in others. One program does one chunk of one
parameter. Gradients are only read: the clip factor costs no pass. Elements are fp32 with exact square root
and division; beta2 is the sum of two fp32 numbers, because 0.999 rounded to one leaves 1 - beta2 five digits.
Scalars are made in fp64: on the host from numbers, in the kernel from 0-dim tensors (clip factor, decay,
learning rate, step). With found_inf set a program writes nothing. There is no backward.

Bytes per element, as at the floor: 28 for AdamW (read p, g, m, v; write p, m, v), 36 with the teacher, 40
with 16-bit copies of both.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from d2vkern.functions.adamw_ema import ADAMW_EMA, adamw_ema_with, columns_of
from d2vkern.kernels._chunks import NONE, address_of, find_chunk, lerp, pointer
from d2vkern.kernels._launch import launch
from d2vkern.kernels._table import table_of
from d2vkern.kernels._tuning import choose, power_of_two_bucket
from d2vkern.reference.adamw_ema import grad_norm as grad_norm  # PyTorch's is a launch or a few


@triton.jit
def adamw_ema_fwd_kernel(
    table_ptr,  # int64, see _table.py; columns p, g, m, v, teacher, copy, teacher's copy
    found_inf_ptr,  # 0-dim or None, as all below
    clip_ptr,
    decay_ptr,
    step_ptr,
    lr_ptr,
    clip,  # factor of the gradients, for want of clip_ptr
    weight,  # 1 - decay, for want of decay_ptr
    weight1,  # 1 - beta1
    weight2,  # 1 - beta2
    beta2,  # an fp32 number just below beta2
    beta2_rest,  # what it lacks
    eps,  # for sqrt(v) / sqrt(bc2), but with step_ptr as given
    rate,  # lr / bc1, for want of step_ptr
    shrink,  # lr * weight_decay, for want of step_ptr
    root_scale,  # 1 / sqrt(bc2), for want of step_ptr
    lr,  # for step_ptr, as all below
    weight_decay,
    log_beta1,
    log_beta2,
    FAIRSEQ: tl.constexpr,
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    record_ptr, first, in_fours, count, kind = find_chunk(table_ptr, CHUNK)
    p, g = address_of(record_ptr, 0), address_of(record_ptr, 1)
    m, v = address_of(record_ptr, 2), address_of(record_ptr, 3)
    teacher, p_copy = address_of(record_ptr, 4), address_of(record_ptr, 5)
    t_copy = address_of(record_ptr, 6)
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
        in_fours, count = tl.where(skip, 0, in_fours), tl.where(skip, 0, count)
    if clip_ptr is not None:
        clip = tl.load(clip_ptr).to(tl.float32)
    if decay_ptr is not None:
        weight = (1.0 - tl.load(decay_ptr).to(tl.float64)).to(tl.float32)
    if step_ptr is not None:
        # A skipped first step has number 0.
        step = tl.maximum(tl.load(step_ptr).to(tl.float64), 1.0)
        if lr_ptr is not None:
            lr = tl.load(lr_ptr)
        lr = tl.cast(lr, tl.float64)
        root_bias2 = tl.sqrt(1.0 - tl.exp(step * log_beta2))
        rate = (lr / (1.0 - tl.exp(step * log_beta1))).to(tl.float32)
        shrink = (lr * weight_decay).to(tl.float32)
        root_scale = (1.0 / root_bias2).to(tl.float32)
        if FAIRSEQ:
            eps = (eps / root_bias2).to(tl.float32)
    tensors = (p, g, m, v, teacher, p_copy, t_copy)
    scalars = (clip, weight, weight1, weight2, beta2, beta2_rest, eps, rate, shrink, root_scale)
    for i in tl.static_range(len(KINDS)):
        if len(KINDS) == 1 or kind == i:
            _update(tensors, scalars, first, 0, in_fours, KINDS, i, True, BLOCK)
            _update(tensors, scalars, first, in_fours, count, KINDS, i, False, BLOCK // 4)


@triton.jit
def _update(
    tensors,
    scalars,
    first,
    start,
    end,
    KINDS: tl.constexpr,
    ROW: tl.constexpr,
    IN_FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements `start` to `end`, counted from `first`."""
    clip, weight, weight1, weight2, beta2, beta2_rest, eps, rate, shrink, root_scale = scalars
    p_ptr = pointer(tensors[0], first, KINDS[ROW][0], IN_FOURS)
    g_ptr = pointer(tensors[1], first, KINDS[ROW][1], IN_FOURS)
    m_ptr = pointer(tensors[2], first, KINDS[ROW][2], IN_FOURS)
    v_ptr = pointer(tensors[3], first, KINDS[ROW][3], IN_FOURS)
    teacher_ptr = pointer(tensors[4], first, KINDS[ROW][4], IN_FOURS)
    p_copy_ptr = pointer(tensors[5], first, KINDS[ROW][5], IN_FOURS)
    t_copy_ptr = pointer(tensors[6], first, KINDS[ROW][6], IN_FOURS)
    for begin in range(start, end, BLOCK):
        # all: [BLOCK]
        at = begin + tl.arange(0, BLOCK)
        inside = at < end
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # 1 outside: 0 / 0 would follow where eps is 0
        v = tl.load(v_ptr + at, mask=inside, other=1.0).to(tl.float32)
        if KINDS[ROW][4] != NONE:
            t = tl.load(teacher_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = g * clip
        m = lerp(m, g, weight1)
        v = v * beta2 + (v * beta2_rest + weight2 * g * g)
        step = tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)
        p = p - (shrink * p + rate * step)
        tl.store(p_ptr + at, p, mask=inside)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        if KINDS[ROW][5] != NONE:
            tl.store(p_copy_ptr + at, p, mask=inside)
        if KINDS[ROW][4] != NONE:
            t = lerp(t, p, weight)
            tl.store(teacher_ptr + at, t, mask=inside)
            if KINDS[ROW][6] != NONE:
                tl.store(t_copy_ptr + at, t, mask=inside)


def _run(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    teachers: list[Tensor],
    taught: list[int],
    copies: list[Tensor],
    copied: list[int],
    teacher_copies: list[Tensor],
    teacher_copied: list[int],
    found_inf: Tensor | None,
    clip_tensor: Tensor | None,
    decay_tensor: Tensor | None,
    step_tensor: Tensor | None,
    lr_tensor: Tensor | None,
    clip: float,
    decay: float,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    eps_mode: str,
) -> None:
    below = float(np.nextafter(np.float32(beta2), np.float32(0.0)))
    if lr_tensor is not None and step_tensor is None:
        step_tensor = torch.full((), step, dtype=torch.float32, device=params[0].device)
    if step_tensor is not None:
        on_host: tuple[float | None, ...] = (eps, None, None, None)
        on_device: tuple[float | None, ...] = (lr, weight_decay, _log(beta1), _log(beta2))
    else:
        root = math.sqrt(1.0 - beta2**step)
        eps = eps / root if eps_mode == "fairseq" else eps
        on_host = (eps, lr / (1.0 - beta1**step), lr * weight_decay, 1.0 / root)
        on_device = (None, None, None, None)
    config = choose(
        "adamw_ema_fwd_kernel",
        power_of_two_bucket(values=sum(map(Tensor.numel, params))),
        [
            {"CHUNK": 8192, "BLOCK": 1024, "num_warps": 8, "num_stages": 1},
            {"CHUNK": 4096, "BLOCK": 1024, "num_warps": 8, "num_stages": 1},
            {"CHUNK": 8192, "BLOCK": 2048, "num_warps": 8, "num_stages": 1},
            {"CHUNK": 16384, "BLOCK": 1024, "num_warps": 4, "num_stages": 1},
        ],
    )
    attached = (teachers, taught, copies, copied, teacher_copies, teacher_copied)
    columns = columns_of(params, grads, exp_avgs, exp_avg_sqs, *attached)
    with table_of("adamw_ema", columns, config["CHUNK"]) as table:
        launch(
            adamw_ema_fwd_kernel,
            (table.programs,),
            table.data,
            found_inf,
            clip_tensor,
            decay_tensor,
            step_tensor,
            lr_tensor,
            clip,
            1.0 - decay,
            1.0 - beta1,
            1.0 - beta2,
            below,
            beta2 - below,
            *on_host,
            *on_device,
            FAIRSEQ=step_tensor is not None and eps_mode == "fairseq",
            KINDS=table.kinds,
            **config,
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


adamw_ema_ = adamw_ema_with(ADAMW_EMA.triton(_run))
