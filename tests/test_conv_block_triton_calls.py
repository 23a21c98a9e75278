"""Triton conv_block as a citizen: launches, costs, torch.library, torch.compile, autocast, auto's choice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

from d2vkern import _backend, conv_block_1d, info  # noqa: E402
from d2vkern._nvtx import force_ranges, tally_costs  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402
from d2vkern.kernels._taps import Places, Taps, column_tiles, product_configs  # noqa: E402
from d2vkern.kernels._taps_weight import shares_of  # noqa: E402
from d2vkern.testing import assert_bitwise_equal, peak_memory  # noqa: E402

from .op_checks import assert_follows_autocast, values_and_gradients  # noqa: E402
from .test_conv_block import Shape, make_plan, make_rows, op  # noqa: E402
from .test_conv_block_triton import FORMS, Settings, make_case, some_forms  # noqa: E402


def triton_op(shape: Shape, **settings: Any) -> Callable[..., Tensor]:
    return op(shape, backend="triton", **settings)


LAUNCHES = {
    "1d": (["taps_weights_kernel", "conv_block_fwd_kernel_rows"], []),
    "2d": (["taps_weights_kernel", "conv_block_fwd_kernel_rows"], []),
    "dense": (["taps_weights_kernel", "taps_tiles_kernel", "conv_block_fwd_kernel_norm"], []),
    "rows": (["taps_weights_kernel", "conv_block_fwd_kernel_rows"], []),
    "plan": (["taps_weights_kernel", "taps_bits_kernel", "conv_block_fwd_kernel_rows"], ["taps_bits_kernel"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_launches(form: str, triton_device: torch.device) -> None:
    shape, settings = FORMS[form]
    inputs = make_case(shape, triton_device)
    function = triton_op(shape, **settings(triton_device))
    with record_launches() as forward:
        out = function(*inputs)
    with record_launches() as backward:
        out.sum().backward()
    with record_launches() as inference, torch.no_grad():
        function(*inputs)
    ahead, bits = LAUNCHES[form]
    names = [[launch.kernel.__name__ for launch in some] for some in (forward, backward, inference)]
    assert names == [
        ahead,
        [
            "conv_block_bwd_kernel_rows",
            "column_sums_kernel",
            "taps_weights_kernel",
            "taps_tiles_kernel",
            *bits,
            "taps_weight_kernel",
            "taps_weight_kernel_sum",
        ],
        ahead,
    ]


@pytest.mark.parametrize("form", ["1d", "dense"])
def test_inference_normalises_in_place(form: str, triton_device: torch.device) -> None:
    if triton_device.type != "cpu":
        pytest.skip("counts the CPU allocator's bytes")
    width = 64 if form == "1d" else 136
    shape = (2, 96, width, width, 1, 1, False)
    x, weight, bias = (v.detach() for v in make_case(shape, triton_device))
    packed = width * triton.cdiv(width, 64) * 64 * 4
    assert peak_memory(lambda: triton_op(shape)(x, weight, bias)) < x.nbytes + packed + (1 << 14)


def test_ranges_and_costs(triton_device: torch.device) -> None:
    shape = (2, 9, 8, 8, 2, 3, False)
    inputs, rows = make_case(shape, triton_device), make_rows(2, 9, 4).to(triton_device)
    plan = make_plan(2, 3, 9, 4).to(triton_device)
    found = []
    for settings in ({}, {"rows": rows}, {"plan": plan}):
        with force_ranges(True), tally_costs() as tallies:
            values_and_gradients(triton_op(shape, **settings), inputs)
        found.append({name: (tally.calls, tally.bytes, tally.flops) for name, tally in tallies.items()})
    x, weights = 2 * 9 * 8 * 4, (8 * 4 * 3 + 8) * 4
    for costs, outputs in zip(found, (18, 8, 54), strict=True):
        y, flops = outputs * 8 * 4, 2 * outputs * 8 * 4 * 3
        assert costs == {
            "conv_block/fwd/triton": (1, x + 2 * y + weights, flops),
            "conv_block/bwd/triton": (1, 2 * x + 2 * y + 2 * weights, 2 * flops),
        }
    with force_ranges(True), tally_costs() as tallies, torch.no_grad():
        triton_op(shape)(*inputs)
    assert tallies["conv_block/fwd/triton"].bytes == x + 18 * 8 * 4 + weights


@some_forms("2d", "rows", "plan")
def test_opcheck(
    shape: Shape, settings: Callable[[torch.device], Settings], triton_device: torch.device
) -> None:
    x, weight, bias = (v.detach() for v in make_case(shape, triton_device))
    given = settings(triton_device)
    plan, index = given.get("plan"), given.get("rows")
    *size, _, _, groups, _, residual = shape
    if len(size) == 2:
        x, weight = x.unsqueeze(1), weight.unsqueeze(2)
    masked, clones = (None, 1) if plan is None else (plan.mask, plan.clones)
    forward = (x, weight, bias, groups, residual, 1e-5, masked, clones, index)
    for save in (False, True):
        torch.library.opcheck(torch.ops.d2vkern.conv_block_fwd.default, (*forward, save))
    y, r = torch.ops.d2vkern.conv_block_fwd(*forward, True)
    for needs in ([True] * 3, [False, False, True]):
        backward = (y.transpose(0, 1).contiguous().transpose(0, 1), x, r, *forward[1:], needs)
        torch.library.opcheck(torch.ops.d2vkern.conv_block_bwd.default, backward)


@pytest.mark.parametrize(
    ("form", "dynamic"),
    [("1d", False), ("1d", True), ("2d", True), ("rows", True), ("plan", True), ("plan", False)],
)
def test_compiles(form: str, dynamic: bool, triton_device: torch.device) -> None:
    torch._dynamo.reset()
    shape, _ = FORMS[form]

    def function(x: Tensor, weight: Tensor, bias: Tensor, given: Any) -> Tensor:
        return triton_op(shape, **({form: given} if given is not None else {}))(x, weight, bias)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=dynamic)
    compiled_after = set()
    for tokens in (9, 13) if dynamic else (9,):
        sized = (*shape[: len(shape) - 6], tokens, *shape[-5:])
        inputs = make_case(sized, triton_device)
        made = {"rows": lambda t: make_rows(2, t, 4), "plan": lambda t: make_plan(2, 2, t, 4)}.get(form)
        given = None if made is None else made(tokens).to(triton_device)
        expected = values_and_gradients(lambda *v, given=given: function(*v, given), inputs)
        actual = values_and_gradients(lambda *v, given=given: compiled(*v, given), inputs)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_bitwise_equal(ours, theirs)
        compiled_after.add(graphs.frame_count)
    assert len(compiled_after) == 1
    with torch.no_grad():
        assert_bitwise_equal(compiled(*inputs, given), expected[0])
    torch._dynamo.reset()


@some_forms("1d", "dense")
def test_autocast_and_checkpointing(
    shape: Shape, settings: Callable[[torch.device], Settings], triton_device: torch.device
) -> None:
    inputs = make_case(shape, triton_device)
    function = triton_op(shape, **settings(triton_device))
    expected = values_and_gradients(function, inputs)
    again = values_and_gradients(lambda *v: checkpoint(function, *v, use_reentrant=False), inputs)
    for repeated, clean in zip(again, expected, strict=True):
        assert_bitwise_equal(repeated, clean)
    assert_follows_autocast(function, inputs)


def test_auto_picks_it_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 runs on request, and the table of backends shows it."""
    monkeypatch.setattr(_backend, "_machine_gaps", lambda backend: ())
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16):
            low = torch.empty(2, 3, 8, device="cuda", dtype=dtype)
            assert _backend._choose("conv_block", (low,), {}) == "triton"
        x = torch.empty(2, 3, 8, device="cuda")
        assert x.device.type == "cuda"
        assert _backend._choose("conv_block", (x,), {}) == "eager"
        assert _backend._choose("residual_norm", (x,), {}) == "triton"
        assert _backend.select("conv_block", "triton", x).__name__ == "d2vkern.kernels.conv_block"
    report = info.collect()["ops"]["conv_block"]
    assert report["triton"] == []
    x, w = torch.randn(1, 3, 4), torch.randn(4, 4, 3)
    with record_launches() as launches:
        conv_block_1d(x, w)
    assert launches == []


@pytest.mark.parametrize(
    ("columns", "tiles"),
    [(8, (16, 0)), (24, (32, 0)), (48, (64, 0)), (64, (64, 0)), (96, (64, 32)), (192, (128, 64))],
)
def test_column_tiles(columns: int, tiles: tuple[int, int]) -> None:
    assert column_tiles(columns, 256) == tiles
    assert column_tiles(768, 256) == (256, 0)


# channels per group, k, rows -> outputs packed into the columns
SPANS = {
    "image base": (48, (3, 3), 1),
    "image large": (64, (5, 5), 1),
    "audio base": (24, (1, 7), 2),
    "audio large": (48, (1, 7), 2),
    "positions": (48, (1, 19), 2),
}


@pytest.mark.parametrize(("width", "kernel", "span"), SPANS.values(), ids=SPANS)
def test_outputs_packed_for_the_presets(width: int, kernel: tuple[int, int], span: int) -> None:
    taps = Taps.of(torch.empty(16 * width, width, *kernel, device="meta"), 16)
    places = Places(256, kernel[0], 196)
    assert product_configs(taps, places, 2, owner=True)[0]["SPAN"] == span
    picked = Places(256, 1, 196, torch.empty(256, 50, device="meta"))
    assert {config["SPAN"] for config in product_configs(taps, picked, 2, owner=True)} == {1}


def test_shares_follow_from_the_shape() -> None:
    config = {"BLOCK_M": 128, "BLOCK_N": 256}
    dense = Taps.of(torch.empty(768, 768, 1, 9, device="meta"), 1)
    assert shares_of(dense, Places(128, 1, 512), 2, config) == 4
    assert shares_of(dense, Places(1, 1, 100), 2, config) == 1
    grouped = Taps.of(torch.empty(768, 48, 3, 3, device="meta"), 16)
    assert shares_of(grouped, Places(256, 14, 14), 2, {"BLOCK_M": 64, "BLOCK_N": 64}) == 9
