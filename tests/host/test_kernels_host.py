"""The CUDA kernels' own source, run on a host block by block (cuda_on_host.hpp), against eager.

What a GPU adds (its compiler, its memory, its timing) is tests/test_native_cuda.py's.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from d2vkern.ops.gather import gather_tokens, scatter_tokens
from d2vkern.ops.masks import MaskPlan, inverse_block_mask, random_mask, span_mask
from d2vkern.reference.ema import ema_update_

CODES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COLUMNS_EMA = ("teacher", "student", "copy")
CHUNK = 2048


def table_of(rows: list[list[Tensor | None]]) -> tuple[np.ndarray, int, list[int]]:
    """table, programs and packed kinds of contiguous tensors, as kernels/_chunks.py lays them out."""
    width = 3 + len(rows[0])
    packed = [sum(0 if x is None else CODES[x.dtype] << 2 * i for i, x in enumerate(row)) for row in rows]
    kinds = sorted(set(packed))
    chunks = [-(-_first(row).numel() // CHUNK) for row in rows]
    programs = sum(chunks)
    words = [(programs + r * width) << 32 | number for r, many in enumerate(chunks) for number in range(many)]
    for row, kind in zip(rows, packed, strict=True):
        given = [x for x in row if x is not None]
        aligned = all(x.data_ptr() % (4 * x.element_size()) == 0 for x in given)
        words += [_first(row).numel(), kinds.index(kind), int(aligned)]
        words += [0 if x is None else x.data_ptr() for x in row]
    return np.array(words, np.int64), programs, kinds


def _first(row: list[Tensor | None]) -> Tensor:
    assert row[0] is not None
    return row[0]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def filled(count: int, dtype: torch.dtype = torch.float32, skipped: int = 0) -> Tensor:
    """`count` normals that start `skipped` elements after an aligned address."""
    return torch.randn(count + skipped + 64).to(dtype)[skipped : skipped + count]


# elements, student's dtype, copy's dtype, elements by which the teacher is off an aligned address
EMA_ROWS = [
    (1, torch.float32, None, 0),
    (2048, torch.bfloat16, torch.bfloat16, 0),
    (4100, torch.float32, torch.float16, 0),
    (4099, torch.float16, torch.float32, 0),
    (513, torch.float32, torch.bfloat16, 1),
    (0, torch.float32, None, 0),
]


@pytest.mark.parametrize("decay", [0.3, 0.999])
@pytest.mark.parametrize("given_as", [None, torch.float32, torch.float64])
def test_ema(kernels_host: ModuleType, decay: float, given_as: torch.dtype | None) -> None:
    rows: list[list[Tensor | None]] = []
    for count, student, copy, skipped in EMA_ROWS:
        low = None if copy is None else torch.zeros(count, dtype=copy)
        rows.append([filled(count, skipped=skipped), filled(count, student), low])
    before = [_first(row).clone() for row in rows]
    table, programs, kinds = table_of(rows)
    scalar = torch.tensor(decay, dtype=given_as or torch.float64)
    weight = np.float32(1.0 - float(scalar))
    at, number = (scalar.data_ptr(), 0.25) if given_as else (0, float(weight))
    kernels_host.ema(table.ctypes.data, programs, CHUNK, kinds, at, CODES[scalar.dtype], number)
    for (teacher, student, low), start in zip(rows, before, strict=True):
        assert teacher is not None and student is not None
        a, b = start.numpy(), student.float().numpy()
        expected = a + weight * (b - a) if weight < 0.5 else b - (np.float32(1.0) - weight) * (b - a)
        assert torch.equal(bits(teacher), bits(torch.from_numpy(expected)))
        if low is not None:
            assert torch.equal(bits(low), bits(teacher.to(low.dtype)))
        eager = [start.clone()]
        ema_update_(eager, [student], float(scalar), [None])
        torch.testing.assert_close(teacher, eager[0], rtol=1e-6, atol=3e-7)


NUMBERS = [0.7, 0.99, 3.0, 1e-2, 0.9, 0.98, 1e-6, 0.05]  # clip, decay, step, lr, betas, eps, weight_decay
# elements, gradient's dtype, teacher or not, dtypes of both copies, elements off an aligned address
ADAMW_ROWS = [
    (1, torch.float32, True, torch.bfloat16, torch.float16, 0),
    (2052, torch.bfloat16, True, torch.bfloat16, torch.bfloat16, 0),
    (4099, torch.float32, False, None, None, 0),
    (130, torch.float16, True, None, torch.float32, 0),
    (77, torch.float32, True, torch.float16, None, 3),
    (0, torch.float32, True, None, None, 0),
]


def adamw_rows() -> list[list[Tensor | None]]:
    rows: list[list[Tensor | None]] = []
    for count, grad, taught, copy, teacher_copy, skipped in ADAMW_ROWS:
        p, m, v = filled(count, skipped=skipped), filled(count), filled(count).abs()
        lows = [None if dtype is None else torch.zeros(count, dtype=dtype) for dtype in (copy, teacher_copy)]
        rows.append([p, filled(count, grad), m, v, filled(count) if taught else None, *lows])
    return rows


@pytest.mark.parametrize("fairseq", [False, True])
@pytest.mark.parametrize("on_device", [(), ("clip", "decay"), ("clip", "decay", "step", "lr"), ("lr",)])
def test_adamw_ema(
    kernels_host: ModuleType, maths_host: ModuleType, fairseq: bool, on_device: tuple[str, ...]
) -> None:
    rows = adamw_rows()
    before = [[None if x is None else x.clone() for x in row] for row in rows]
    table, programs, kinds = table_of(rows)
    numbers, tensors = list(NUMBERS), [(0, 0)]
    held = []
    for i, name in enumerate(("clip", "decay", "step", "lr")):
        if name in on_device:
            scalar = torch.tensor(NUMBERS[i], dtype=torch.float64)
            held.append(scalar)
            numbers[i] = 0.125  # the tensor stands for it
            tensors.append((scalar.data_ptr(), CODES[scalar.dtype]))
        else:
            tensors.append((0, 0))
    kernels_host.adamw_ema(table.ctypes.data, programs, CHUNK, kinds, numbers, tensors, fairseq)
    scalars = maths_host.adamw_scalars(*NUMBERS, fairseq)
    for row, old in zip(rows, before, strict=True):
        arrays = [x.float().numpy() for x in old[:4] if x is not None]
        expected = [torch.from_numpy(x) for x in maths_host.adamw_elements(*arrays, scalars)]
        for i, wanted in zip((0, 2, 3), expected, strict=True):
            assert torch.equal(bits(row[i]), bits(wanted)), ("p", "g", "m", "v")[i]
        assert torch.equal(bits(row[1]), bits(old[1]))
        if row[4] is not None:
            taught = maths_host.lerp(old[4].numpy(), expected[0].numpy(), scalars.weight)
            assert torch.equal(bits(row[4]), bits(torch.from_numpy(taught)))
            if row[6] is not None:
                assert torch.equal(bits(row[6]), bits(row[4].to(row[6].dtype)))
        if row[5] is not None:
            assert torch.equal(bits(row[5]), bits(row[0].to(row[5].dtype)))


def test_found_inf_changes_nothing(kernels_host: ModuleType) -> None:
    rows = adamw_rows()
    before = [[None if x is None else x.clone() for x in row] for row in rows]
    table, programs, kinds = table_of(rows)
    for value, changed in ((1.0, False), (float("inf"), False), (0.0, True)):
        found = torch.tensor(value)
        tensors = [(found.data_ptr(), 1), *[(0, 0)] * 4]
        kernels_host.adamw_ema(table.ctypes.data, programs, CHUNK, kinds, NUMBERS, tensors, False)
        same = all(
            x is None or torch.equal(bits(x), bits(old))
            for row, olds in zip(rows, before, strict=True)
            for x, old in zip(row, olds, strict=True)
        )
        assert same is not changed


IDS = torch.tensor([3, -1, 1 << 40])
# settings of masks_fwd_kernel, and what makes the same plan
MASKS = {
    "one warp": ((14, 14, 6, 3, 3, 39, True), lambda **more: inverse_block_mask(
        IDS, 2, (14, 14), prob=0.8, length=3, adjust=0.0767, **more)),
    "one warp, odd": ((1, 67, 0, 1, 1, 34, True), lambda **more: random_mask(IDS, 2, 67, prob=0.48, **more)),
    "two warps": ((1, 500, 55, 1, 5, 250, False), lambda **more: span_mask(
        IDS, 2, 500, prob=0.5, length=5, adjust=0.05, **more)),
    "four warps, odd": ((1, 601, 60, 1, 6, 300, False), lambda **more: span_mask(
        IDS, 2, 601, prob=0.5, length=6, adjust=0.1, **more)),
}  # fmt: skip


@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masks(kernels_host: ModuleType, case, on_device: bool) -> None:
    settings, make = case
    seed, epoch = -77, 5
    plan = make(seed=seed, epoch=epoch)
    check_masks(kernels_host, IDS, 2, settings, plan, seed, epoch, on_device)


def test_rows_beyond_shared_memory(kernels_host: ModuleType) -> None:
    plan = span_mask(IDS[:1], 1, 8197, prob=0.5, length=5, adjust=0.05, seed=1, epoch=0)
    settings = (1, 8197, int(8197 * (0.55 / 5)), 1, 5, int(8197 * 0.5), False)
    check_masks(kernels_host, IDS[:1], 1, settings, plan, 1, 0, False)


def check_masks(
    kernels_host: ModuleType, ids: Tensor, clones: int, settings, plan: MaskPlan, seed: int, epoch: int,
    on_device: bool,
) -> None:  # fmt: skip
    words = torch.tensor([seed, epoch])
    spread = torch.full((len(ids), 3), 9).index_copy_(1, torch.tensor([0]), ids[:, None])[:, 0]
    mask, slot = torch.full_like(plan.mask, True), torch.full_like(plan.slot, -9)
    ids_keep = torch.full_like(plan.ids_keep, -9)
    at = (words[0:].data_ptr(), 1, words[1:].data_ptr(), 2) if on_device else (0, seed, 0, epoch)
    kernels_host.masks(
        spread.data_ptr(), spread.stride(0), len(slot), clones, settings[:6], settings[6], *at,
        mask.data_ptr(), slot.data_ptr(), ids_keep.data_ptr(),
    )  # fmt: skip
    for name, one in (("mask", mask), ("slot", slot), ("ids_keep", ids_keep)):
        assert torch.equal(one, getattr(plan, name)), name


def wide_rows(*tensors: Tensor | None) -> bool:
    """Whether 16 bytes go at once, as gather.cu decides."""
    places = 0
    for x in tensors:
        if x is not None:
            strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
            for value in (x.shape[-1] * x.element_size(), *(s * x.element_size() for s in strides)):
                places |= value
            places |= x.data_ptr()
    return places % 16 == 0


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# width, elements by which x is off an aligned address; whether 16-byte accesses follow
LAYOUTS = {
    "whole accesses": (64, 0, True),
    "more than one access a lane": (1096, 0, True),
    "misaligned": (64, 1, False),
    "odd width": (13, 0, False),
}
B, M, T, EXTRAS = 3, 2, 9, 2


def _plan() -> MaskPlan:
    return random_mask(torch.arange(B), M, T, prob=0.6, seed=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("parts", ["x", "x extra", "x positions per_mask", "x extra positions per_mask"])
def test_gather(kernels_host: ModuleType, dtype: torch.dtype, layout, parts: str) -> None:
    width, skipped, wide = layout
    plan = _plan()
    x = filled(B * T * width, dtype, skipped).view(B, T, width)
    extra = filled(EXTRAS * width, dtype).view(EXTRAS, width) if "extra" in parts else None
    positions = filled(T * width, dtype).view(T, width) if "positions" in parts else None
    per_mask = filled(B * M * T * width, dtype).view(B * M, T, width) if "per_mask" in parts else None
    expected = gather_tokens(x, plan, extra=extra, positions=positions, per_mask=per_mask, backend="eager")
    out = torch.full_like(expected, 99.0)
    tensors = (x, extra, positions, per_mask, out)
    assert wide_rows(*tensors) is wide
    kernels_host.gather_fwd(
        CODES[dtype], wide,
        [address(y) for y in (x, plan.ids_keep, extra, positions, per_mask, out)],
        [*x.stride()[:2], 0, width, width, T * width, width],
        [B * M, plan.kept, 0 if extra is None else EXTRAS, width, M],
    )  # fmt: skip
    assert torch.equal(out, expected)


NEEDS = ["x", "x extra", "positions", "extra per_mask", "x extra positions per_mask", "nothing"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("needed", NEEDS)
def test_gather_backward(kernels_host: ModuleType, dtype: torch.dtype, layout, needed: str) -> None:
    width, skipped, wide = layout
    plan, samples = _plan(), 7
    plan = random_mask(torch.arange(samples), M, T, prob=0.6, seed=3)
    names = needed.split()
    shapes = {"x": (samples, T, width), "extra": (EXTRAS, width), "positions": (T, width)}
    shapes["per_mask"] = (samples * M, T, width)
    dout = filled(samples * M * (EXTRAS + plan.kept) * width, dtype, skipped)
    dout = dout.view(samples * M, EXTRAS + plan.kept, width)
    grads = {name: torch.full(shape, 99.0, dtype=dtype) for name, shape in shapes.items()}
    groups = -(-samples // (4 if "positions" in names else 1))
    sums = torch.full((groups, EXTRAS + T, width), float("nan"))
    assert wide_rows(dout) is wide
    of = {name: grads[name].data_ptr() if name in names else 0 for name in shapes}
    summed = "extra" in names or "positions" in names
    kernels_host.gather_bwd(
        CODES[dtype], wide,
        [dout.data_ptr(), plan.slot.data_ptr(), of["x"], of["per_mask"], sums.data_ptr() if summed else 0,
         of["extra"], of["positions"]],
        [*dout.stride()[:2]], [samples, M, T, EXTRAS, width], [name in names for name in shapes],
    )  # fmt: skip
    leaves = {name: torch.zeros(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    others = {name: leaf for name, leaf in leaves.items() if name != "x"}
    gather_tokens(leaves["x"], plan, **others, backend="eager").backward(dout)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        if name not in names:
            assert (grads[name] == 99.0).all()
        elif name in ("x", "per_mask"):
            assert torch.equal(grads[name], leaf.grad), name
        else:
            # The order of sums over samples is each backend's own.
            error = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
            torch.testing.assert_close(grads[name], leaf.grad, rtol=error, atol=4 * error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("seed_on_device", [False, True])
def test_scatter(
    kernels_host: ModuleType, dtype: torch.dtype, layout, noise_std: float, seed_on_device: bool
) -> None:
    width, skipped, wide = layout
    plan, seed = _plan(), -5
    x = filled(B * M * (EXTRAS + plan.kept) * width, dtype, skipped).view(B * M, EXTRAS + plan.kept, width)
    expected = scatter_tokens(x, plan, noise_std=noise_std, seed=seed, backend="eager")
    out = torch.full_like(expected, 99.0)
    word = torch.tensor(seed)
    assert wide_rows(x, out) is wide
    kernels_host.scatter_fwd(
        CODES[dtype], wide,
        [x.data_ptr(), plan.slot.data_ptr(), word.data_ptr() if seed_on_device else 0, 0, out.data_ptr()],
        [*x.stride()[:2]], [B * M, T, EXTRAS, width, 0], 1 if seed_on_device else seed, noise_std,
    )  # fmt: skip
    kept = ~plan.mask
    assert torch.equal(out[kept], expected[kept])
    # Normals within 4 ulp, and one more rounding of the product and of the dtype.
    ulps = {torch.float32: 5, torch.float16: 1, torch.bfloat16: 1}[dtype]
    step = torch.finfo(dtype).eps * expected.float().abs()
    assert ((out.float() - expected.float()).abs() <= ulps * step + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mask_token_and_extra_tokens_of_padded_rows(
    kernels_host: ModuleType, dtype: torch.dtype, layout
) -> None:
    """Scatter, and its backward: a gather whose extra tokens differ from row to row, and the token's sum."""
    width, skipped, wide = layout
    plan = MaskPlan.from_mask(
        torch.rand(B * M, T).argsort(1) < torch.arange(1, B * M + 1)[:, None], M, pad=True
    )
    x = filled(B * M * (EXTRAS + plan.kept) * width, dtype, skipped).view(B * M, EXTRAS + plan.kept, width)
    token = filled(width, dtype)
    leaves = [y.detach().clone().requires_grad_() for y in (x, token)]
    expected = scatter_tokens(leaves[0], plan, mask_token=leaves[1], keep_extra=True, backend="eager")
    out = torch.full_like(expected, 99.0)
    assert wide_rows(x, token, out) is wide
    kernels_host.scatter_fwd(
        CODES[dtype], wide, [x.data_ptr(), plan.slot.data_ptr(), 0, token.data_ptr(), out.data_ptr()],
        [*x.stride()[:2]], [B * M, T, EXTRAS, width, EXTRAS], 0, 0.0,
    )  # fmt: skip
    assert torch.equal(out, expected)
    dout = filled(out.numel(), dtype, skipped).view(out.shape)
    expected.backward(dout)
    dx, dtokens = torch.full_like(x, 99.0), dout[:, EXTRAS:]
    kernels_host.gather_fwd(
        CODES[dtype], wide,
        [dtokens.data_ptr(), plan.ids_keep.data_ptr(), dout.data_ptr(), 0, 0, dx.data_ptr()],
        [*dtokens.stride()[:2], *dout.stride()[:2], 0, 0, 0], [B * M, plan.kept, EXTRAS, width, 1],
    )  # fmt: skip
    assert torch.equal(dx, leaves[0].grad)
    each, dtoken = 8, torch.full_like(token, 99.0)
    sums = torch.full((-(-B * M * T // each), width), float("nan"))
    kernels_host.mask_token_bwd(
        CODES[dtype], wide, [dtokens.data_ptr(), plan.slot.data_ptr(), sums.data_ptr(), dtoken.data_ptr()],
        [*dtokens.stride()[:2]], [B * M, T, width, each],
    )  # fmt: skip
    error = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(dtoken, leaves[1].grad, rtol=error, atol=16 * error)


def test_rows_are_strided(kernels_host: ModuleType) -> None:
    plan, width = _plan(), 16
    x = torch.randn(T, B, 2 * width).transpose(0, 1)[:, :, :width]
    expected = gather_tokens(x, plan, backend="eager")
    out = torch.empty_like(expected)
    kernels_host.gather_fwd(
        1, wide_rows(x, out), [x.data_ptr(), plan.ids_keep.data_ptr(), 0, 0, 0, out.data_ptr()],
        [*x.stride()[:2], 0, 0, 0, 0, 0], [B * M, plan.kept, 0, width, M],
    )  # fmt: skip
    assert torch.equal(out, expected)
