"""Element updates, 16-bit floats, access widths and chunk maps of csrc/*.cuh on a host, against Python."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from d2vkern.kernels import _table
from d2vkern.reference.adamw_ema import adamw_ema_

NONE, FP32, FP16, BF16 = range(4)
CODES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
f32 = np.float32

# clip, decay, step, lr, beta1, beta2, eps, weight_decay, fairseq
SETTINGS = {
    "first step": (1.0, 0.999, 1.0, 1e-3, 0.9, 0.999, 1e-8, 0.01, False),
    "first step, fairseq": (1.0, 0.999, 1.0, 1e-3, 0.9, 0.98, 1e-6, 0.01, True),
    "later, clipped": (0.37, 0.9998, 1000.0, 5e-4, 0.9, 0.999, 1e-8, 0.05, False),
    "later, clipped, fairseq": (0.37, 0.99999, 777.0, 5e-4, 0.9, 0.98, 1e-6, 0.01, True),
    "no decay, no momentum": (1.0, 0.0, 5.0, 1e-2, 0.0, 0.0, 1e-8, 0.0, False),
    "average stands still": (1.0, 1.0, 3.0, 1e-2, 0.5, 0.95, 0.0, 0.1, False),
}


def expected_scalars(setting: tuple[float, ...]) -> dict[str, np.float32]:
    """As kernels/adamw_ema.py makes them, in fp64."""
    clip, decay, step, lr, beta1, beta2, eps, weight_decay, fairseq = setting
    step = max(step, 1.0)
    root = math.sqrt(1.0 - beta2**step)
    below = float(np.nextafter(f32(beta2), f32(0.0)))
    return {
        "clip": f32(clip), "weight": f32(1.0 - decay),
        "weight1": f32(1.0 - beta1), "weight2": f32(1.0 - beta2),
        "beta2": f32(below), "beta2_rest": f32(beta2 - below), "eps": f32(eps / root if fairseq else eps),
        "rate": f32(lr / (1.0 - beta1**step)), "shrink": f32(lr * weight_decay),
        "root_scale": f32(1.0 / root),
    }  # fmt: skip


def lerp(start: np.ndarray, end: np.ndarray, weight: np.float32) -> np.ndarray:
    way = end - start
    return start + weight * way if weight < 0.5 else end - (f32(1.0) - weight) * way


def expected_elements(
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, s: dict[str, np.float32]
) -> tuple[np.ndarray, ...]:
    """In the order of operations of kernels/adamw_ema.py, each rounded to fp32."""
    g = g * s["clip"]
    m = lerp(m, g, s["weight1"])
    v = v * s["beta2"] + (v * s["beta2_rest"] + s["weight2"] * g * g)
    step = m / (np.sqrt(v) * s["root_scale"] + s["eps"])
    return p - (s["shrink"] * p + s["rate"] * step), m, v


def elements(count: int) -> list[np.ndarray]:
    """p, g, m, v of many magnitudes, with zeros and negative zeros."""
    draw = np.random.default_rng(0)
    size = 10.0 ** draw.uniform(-12, 4, (4, count))
    p, g, m, v = (size * np.where(draw.random((4, count)) < 0.5, -1, 1)).astype(f32)
    p[:3], g[1:4], m[2:5] = 0.0, -0.0, 0.0
    return [p, g, m, np.abs(v)]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_adamw_element_is_the_formula_in_fp32(maths_host: ModuleType, setting: tuple[float, ...]) -> None:
    scalars = maths_host.adamw_scalars(*setting)
    wanted = expected_scalars(setting)
    assert {name: getattr(scalars, name) for name in wanted} == {name: float(x) for name, x in wanted.items()}
    p, g, m, v = elements(20000)
    actual = maths_host.adamw_elements(p, g, m, v, scalars)
    for name, one, other in zip("pmv", actual, expected_elements(p, g, m, v, wanted), strict=True):
        assert other.dtype == f32
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_adamw_element_is_eager_s_up_to_rounding(maths_host: ModuleType, setting: tuple[float, ...]) -> None:
    clip, _, step, lr, beta1, beta2, eps, weight_decay, fairseq = setting
    draw = np.random.default_rng(1)
    p, g, m = draw.standard_normal((3, 4000)).astype(f32)
    v = draw.random(4000).astype(f32)
    actual = maths_host.adamw_elements(p, g, m, v, maths_host.adamw_scalars(*setting))
    eager = [torch.from_numpy(x.copy()) for x in (p, g, m, v)]
    adamw_ema_(
        *([x] for x in eager), step, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
        eps_mode="fairseq" if fairseq else "torch", clip_factor=clip, teachers=[None], ema_decay=None,
        copies=[None], teacher_copies=[None],
    )  # fmt: skip
    for one, other in zip(actual, (eager[0], eager[2], eager[3]), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=2e-6, atol=1e-6)


def test_a_skipped_first_step_counts_as_the_first(maths_host: ModuleType) -> None:
    rest = SETTINGS["first step"][3:]
    zero, one = (maths_host.adamw_scalars(1.0, 0.9, step, *rest) for step in (0.0, 1.0))
    assert (zero.rate, zero.root_scale) == (one.rate, one.root_scale)


def test_beta2_is_held_in_two_parts(maths_host: ModuleType) -> None:
    scalars = maths_host.adamw_scalars(*SETTINGS["later, clipped"])
    assert scalars.beta2 < 0.999 and abs(scalars.beta2 + scalars.beta2_rest - 0.999) < 1e-14


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.5, 0.51, 0.999, 0.99999, 1.0])
def test_average_is_torch_s_lerp(maths_host: ModuleType, decay: float) -> None:
    t, s = np.random.default_rng(2).standard_normal((2, 5000)).astype(f32)
    weight = maths_host.weight_of(decay)
    assert weight == f32(1.0 - decay)
    actual = maths_host.lerp(t, s, weight)
    np.testing.assert_array_equal(actual.view(np.uint32), lerp(t, s, f32(weight)).view(np.uint32))
    # torch may fuse the multiply-add.
    expected = torch.lerp(torch.from_numpy(t), torch.from_numpy(s), float(weight))
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-6, atol=2.5e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_is_read_exactly(maths_host: ModuleType, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    actual = maths_host.float_of_fp16(bits) if dtype == torch.float16 else maths_host.float_of_bf16(bits)
    np.testing.assert_array_equal(actual, expected)  # takes NaNs as equal
    assert (np.signbit(actual) == np.signbit(expected)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_torch_s(maths_host: ModuleType, dtype: torch.dtype) -> None:
    """Every 16-bit float, the middle to the next one, both fp32 neighbours of that, and any bits at all."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middles = (halves.double() + halves.roll(-1).double()).mul(0.5).float().numpy()
    infinity = f32(np.inf)
    some = np.random.default_rng(3).integers(0, 1 << 32, 500000, dtype=np.uint32).view(f32)
    around = [
        halves.numpy(),
        middles,
        np.nextafter(middles, infinity),
        np.nextafter(middles, -infinity),
        some,
    ]
    x = np.concatenate(around)
    actual = maths_host.fp16_of(x) if dtype == torch.float16 else maths_host.bf16_of(x)
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(actual[number], expected[number])
    back = torch.from_numpy(actual.view(np.int16)).view(dtype)
    assert back[torch.from_numpy(~number)].isnan().all()


@pytest.mark.parametrize(
    ("places", "width"),
    [
        ([0x7F0000000000, 1536], 16),
        ([0x7F0000000008, 1536], 8),
        ([0x7F0000000004, 1536], 4),
        ([0x7F0000000002, 1536], 2),
        ([0x7F0000000001, 1536], 1),
        ([0x7F0000000000, 1536, 1544], 8),
        ([0x7F0000000000, 1538], 2),
        ([0x7F0000000020, 64, 0], 16),
        ([0], 16),
    ],
)
def test_widest_access(maths_host: ModuleType, places: list[int], width: int) -> None:
    assert maths_host.widest_access(int(np.bitwise_or.reduce(np.array(places, np.uint64)))) == width
    assert all(place % width == 0 for place in places)


@pytest.mark.parametrize(("code", "bytes_of_four"), [(FP32, 16), (FP16, 8), (BF16, 8)])
def test_four_elements_are_one_access_where_aligned(
    maths_host: ModuleType, code: int, bytes_of_four: int
) -> None:
    taken = [offset for offset in range(0, 64, 2) if maths_host.takes_fours(0x7F0000000000 + offset, code)]
    assert taken == list(range(0, 64, bytes_of_four))
    assert maths_host.takes_fours(0x7F0000000001, NONE)


# elements of a row's tensors, dtype of its second, elements that its first is off an aligned address
ROWS = [
    (1, torch.float32, 0), (4, torch.float16, 0), (7, torch.float16, 1), (64, torch.float16, 0),
    (65, torch.float32, 0), (0, torch.float32, 0), (200, torch.float32, 2), (128, torch.float16, 4),
]  # fmt: skip


def table_of_rows(
    chunk: int,
) -> tuple[np.ndarray, int, list[tuple[Tensor, Tensor]], tuple[tuple[int, ...], ...]]:
    rows = []
    for count, dtype, skipped in ROWS:
        rows.append((torch.zeros(count + skipped)[skipped:], torch.zeros(count, dtype=dtype)))
    columns = (
        _table.Column("a", [a for a, _ in rows], written=True),
        _table.Column("b", [b for _, b in rows]),
    )
    with _table.table_of("test", columns, chunk) as table:
        return table.data.numpy(), table.programs, rows, table.kinds


@pytest.mark.parametrize("chunk", [8, 64, 8192])
def test_chunks_cover_every_element_once(maths_host: ModuleType, chunk: int) -> None:
    table, programs, rows, kinds = table_of_rows(chunk)
    parts: dict[int, list[int]] = {}
    for record, first, in_fours, count, kind, *addresses in maths_host.find_chunks(table, programs, chunk, 2):
        row = (record - programs) // 5
        a, b = rows[row]
        assert (record - programs) % 5 == 0 and addresses == [a.data_ptr(), b.data_ptr()]
        assert kinds[kind] == (FP32, CODES[b.dtype])
        together = all(maths_host.takes_fours(x.data_ptr(), CODES[x.dtype]) for x in (a, b))
        assert 0 < count <= chunk and in_fours == (count - count % 4 if together else 0)
        parts.setdefault(row, []).extend(range(first, first + count))
    assert parts == {row: list(range(count)) for row, (count, _, _) in enumerate(ROWS) if count}


def test_kinds_are_packed_two_bits_a_column(maths_host: ModuleType) -> None:
    codes = [FP32, BF16, NONE, FP16, FP32, NONE, BF16]
    packed = sum(code << 2 * column for column, code in enumerate(codes))
    assert packed < 1 << 16
    assert [maths_host.code_of(packed, column) for column in range(7)] == codes
