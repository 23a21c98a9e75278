"""How a program of a many-tensor kernel finds its chunk of work in the table of `_table.py`.

Kinds are constexprs: one kind, the usual case, compiles to straight code; with several each program takes one
uniform branch.
"""

import triton
import triton.language as tl

from d2vkern.kernels import _table

NONE, FP32, FP16, BF16 = (tl.constexpr(code) for code in (_table.NONE, _table.FP32, _table.FP16, _table.BF16))


@triton.jit
def find_chunk(table_ptr, CHUNK: tl.constexpr):
    """(record, first element, elements that go four at a time, elements, kind) of this program's chunk."""
    word = tl.load(table_ptr + tl.program_id(0))
    record_ptr = table_ptr + (word >> 32)
    first = (word & 0xFFFFFFFF) * CHUNK
    count = tl.minimum(tl.load(record_ptr) - first, CHUNK).to(tl.int32)
    in_fours = tl.where(tl.load(record_ptr + 2) != 0, count, 0) // 4 * 4
    return record_ptr, first, in_fours, count, tl.load(record_ptr + 1)


@triton.jit
def address_of(record_ptr, COLUMN: tl.constexpr):
    """Address of the row's tensor in a column."""
    return tl.load(record_ptr + (3 + COLUMN))


@triton.jit
def pointer(address, first, CODE: tl.constexpr, IN_FOURS: tl.constexpr):
    """Pointer to element `first` of the tensor at an address."""
    dtype: tl.constexpr = tl.float32 if CODE == FP32 else (tl.float16 if CODE == FP16 else tl.bfloat16)
    x_ptr = address.to(tl.pointer_type(dtype)) + first
    if IN_FOURS:
        x_ptr = tl.multiple_of(x_ptr, 16 if CODE == FP32 else 8)
    return x_ptr


@triton.jit
def lerp(start, end, weight):
    """start + weight * (end - start), from the nearer side, as torch.lerp; weight is an fp32 scalar."""
    way = end - start
    return tl.where(weight < 0.5, start + weight * way, end - (1.0 - weight) * way)
