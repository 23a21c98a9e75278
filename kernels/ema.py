"""Moving average of many tensors in one launch.

    teacher += (1 - decay) * (student - teacher);  copy = round(teacher)

Layout and dtypes: `_table.py`; teacher fp32 as a rule, student and copy fp32, fp16 or bf16, per row. One
program does one chunk of one tensor. All arithmetic is fp32; 1 - decay is made in fp64, on the host from a
number and in the kernel from a 0-dim tensor. There is no backward.

Bytes per element, as at the floor: 12 with an fp32 student (read teacher and student, write teacher), 10 with
a 16-bit one; 2 more for a 16-bit copy, 4 for an fp32 one.
"""

import triton
import triton.language as tl
from torch import Tensor

from d2vkern.functions.ema import EMA_UPDATE, columns_of, ema_update_with
from d2vkern.kernels._chunks import NONE, address_of, find_chunk, lerp, pointer
from d2vkern.kernels._launch import launch
from d2vkern.kernels._table import table_of
from d2vkern.kernels._tuning import choose, power_of_two_bucket


@triton.jit
def ema_fwd_kernel(
    table_ptr,  # int64, see _table.py; columns teacher, student, copy
    decay_ptr,  # 0-dim, any float, or None
    weight,  # 1 - decay, or None
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    record_ptr, first, in_fours, count, kind = find_chunk(table_ptr, CHUNK)
    teacher, student = address_of(record_ptr, 0), address_of(record_ptr, 1)
    copy = address_of(record_ptr, 2)
    if decay_ptr is not None:
        weight = (1.0 - tl.load(decay_ptr).to(tl.float64)).to(tl.float32)
    for i in tl.static_range(len(KINDS)):
        if len(KINDS) == 1 or kind == i:
            _average(teacher, student, copy, weight, first, 0, in_fours, KINDS, i, True, BLOCK)
            _average(teacher, student, copy, weight, first, in_fours, count, KINDS, i, False, BLOCK // 4)


@triton.jit
def _average(
    teacher,
    student,
    copy,
    weight,
    first,
    start,
    end,
    KINDS: tl.constexpr,
    ROW: tl.constexpr,
    IN_FOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements `start` to `end`, counted from `first`."""
    t_ptr = pointer(teacher, first, KINDS[ROW][0], IN_FOURS)
    s_ptr = pointer(student, first, KINDS[ROW][1], IN_FOURS)
    c_ptr = pointer(copy, first, KINDS[ROW][2], IN_FOURS)
    for begin in range(start, end, BLOCK):
        # all: [BLOCK]
        at = begin + tl.arange(0, BLOCK)
        inside = at < end
        t = tl.load(t_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)
        t = lerp(t, s, weight)
        tl.store(t_ptr + at, t, mask=inside)
        if KINDS[ROW][2] != NONE:
            tl.store(c_ptr + at, t, mask=inside)


def _run(
    teacher: list[Tensor],
    student: list[Tensor],
    copies: list[Tensor],
    copied: list[int],
    decay: float,
    decay_tensor: Tensor | None,
) -> None:
    config = choose(
        "ema_fwd_kernel",
        power_of_two_bucket(values=sum(map(Tensor.numel, teacher))),
        [
            {"CHUNK": 8192, "BLOCK": 2048, "num_warps": 8, "num_stages": 1},
            {"CHUNK": 4096, "BLOCK": 1024, "num_warps": 4, "num_stages": 1},
            {"CHUNK": 16384, "BLOCK": 2048, "num_warps": 8, "num_stages": 1},
            {"CHUNK": 32768, "BLOCK": 4096, "num_warps": 8, "num_stages": 1},
        ],
    )
    columns = columns_of(teacher, student, copies, copied)
    with table_of("ema", columns, config["CHUNK"]) as table:
        launch(
            ema_fwd_kernel,
            (table.programs,),
            table.data,
            decay_tensor,
            None if decay_tensor is not None else 1.0 - decay,
            KINDS=table.kinds,
            **config,
        )


ema_update_ = ema_update_with(EMA_UPDATE.triton(_run))
