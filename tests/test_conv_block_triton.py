"""Triton conv_block beside eager: values, gradients, masked inputs, picked outputs, strides, repeats."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2vkern import BackendError, MaskPlan, conv_block_1d, conv_block_2d  # noqa: E402
from d2vkern.kernels import _taps_weight, conv_block_bwd, conv_block_fwd  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402
from d2vkern.kernels._tuning import forced, record_choices  # noqa: E402
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy  # noqa: E402

from .op_checks import assert_repeats, spread, values_and_gradients  # noqa: E402
from .test_conv_block import SHAPES_1D, SHAPES_2D, Shape, make_plan, make_rows, op  # noqa: E402
from .test_conv_block import make_case as make_cpu_case  # noqa: E402

# N, [H,] T, C, O, groups, kernel, residual: the presets' layers with fewer groups, rows and taps
PRESETS = {
    "image base, 48 a group": (1, 5, 4, 96, 96, 2, 3, True),
    "image large, 64 a group, 5x5": (1, 3, 3, 64, 64, 1, 5, True),
    "audio base, first layer, 48 to 24": (2, 9, 96, 48, 2, 7, False),
    "audio base, 24 a group": (2, 11, 48, 48, 2, 7, True),
    "audio large, first layer, 64 to 48": (1, 11, 64, 48, 1, 7, False),
    "audio large, 48 a group": (2, 11, 96, 96, 2, 7, True),
    "positions, k=19": (1, 23, 48, 48, 1, 19, False),
    "text, dense, two tiles of columns": (2, 7, 16, 264, 1, 9, False),
}
# what no preset has
FURTHER = {
    "132 a group, tiles of two groups": (1, 4, 24, 264, 2, 3, False),
    "dense, with residual": (1, 5, 136, 136, 1, 1, True),
    "rows of two programs": (5, 29, 8, 8, 1, 3, True),
    "even kernel, two outputs a block": (2, 7, 48, 48, 1, 8, True),
    "two outputs a block, one token": (3, 1, 48, 48, 1, 7, True),
}
SMALL: dict[str, Shape] = {
    **{f"1d, {name}": shape for name, shape in SHAPES_1D.items()},
    **{f"2d, {name}": shape for name, shape in SHAPES_2D.items()},
}
SHAPES: dict[str, Shape] = {**PRESETS, **FURTHER}
FEW = 1024
Settings = dict[str, Any]


def make_case(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32, masters: bool = False
) -> list[Tensor]:
    """x, weight, bias; masters: the last two stay fp32."""
    made = make_cpu_case(shape, torch.float32)
    kinds = (dtype, *[torch.float32 if masters else dtype] * 2)
    return [v.detach().to(device, kind).requires_grad_() for v, kind in zip(made, kinds, strict=True)]


def exactly(settings: Settings) -> Settings:
    """The settings on the CPU."""
    return {
        name: value.to("cpu") if isinstance(value, (Tensor, MaskPlan)) else value
        for name, value in settings.items()
    }


def assert_matches_eager(shape: Shape, inputs: list[Tensor], **settings: Any) -> None:
    """Output and gradients: dtypes as eager's, error to fp64 at most twice eager's; and triton ran."""
    exact = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    with backend_spy() as calls:
        ours = values_and_gradients(op(shape, backend="triton", **settings), inputs)
    assert calls == [("conv_block", "triton")]
    eager = values_and_gradients(op(shape, backend="eager", **settings), inputs)
    truth = values_and_gradients(op(shape, backend="eager", **exactly(settings)), exact)
    for actual, same_dtype, reference in zip(ours, eager, truth, strict=True):
        # The largest of few errors of two equally good orders of summation differ by more than two.
        factor = 4.0 if reference.numel() < FEW else 2.0
        assert_no_worse_than_eager(actual.cpu(), same_dtype.cpu(), reference, factor)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_eager(shape: Shape, triton_device: torch.device) -> None:
    assert_matches_eager(shape, make_case(shape, triton_device))


# Tiles differ between 16 and 32 bits.
@pytest.mark.parametrize(
    "name", ["image base, 48 a group", "audio large, 48 a group", "text, dense, two tiles of columns"]
)
def test_fp16_matches_eager(name: str, triton_device: torch.device) -> None:
    assert_matches_eager(SHAPES[name], make_case(SHAPES[name], triton_device, torch.float16))


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_small_shapes_match_eager(shape: Shape, triton_device: torch.device) -> None:
    assert_matches_eager(shape, make_case(shape, triton_device))


# b, t, C, O, groups, kernel
MASKED = {
    "positions, k=19, two outputs a block": (2, 21, 48, 48, 1, 19),
    "even kernel": (2, 6, 8, 8, 2, 4),
    "dense": (1, 7, 8, 136, 1, 3),
    "one token": (2, 1, 4, 4, 1, 3),
    "more taps than bits": (1, 5, 4, 4, 2, 30),
}


@pytest.mark.parametrize("clones", [1, 3])
@pytest.mark.parametrize("shape", MASKED.values(), ids=MASKED)
def test_plan_zeroes_masked_places(shape: Shape, clones: int, triton_device: torch.device) -> None:
    shape = (*shape, False)
    plan = make_plan(shape[0], clones, shape[1], shape[1] // 2).to(triton_device)
    assert_matches_eager(shape, make_case(shape, triton_device), plan=plan)


def test_plan_in_fp16(triton_device: torch.device) -> None:
    shape = (2, 21, 48, 48, 1, 19, False)
    plan = make_plan(2, 3, 21, 10).to(triton_device)
    assert_matches_eager(shape, make_case(shape, triton_device, torch.float16), plan=plan)


def test_all_masked_is_the_bias_everywhere(triton_device: torch.device) -> None:
    shape = (2, 5, 4, 6, 2, 3, False)
    inputs = make_case(shape, triton_device)
    plan = MaskPlan.from_mask(torch.ones(4, 5, dtype=torch.bool, device=triton_device), 2)
    out, dx, dw, _ = values_and_gradients(op(shape, backend="triton", plan=plan), inputs)
    assert torch.equal(out, out[:1, :1].expand_as(out)) and out[0, 0].std() > 0.1
    assert (dx == 0).all() and (dw == 0).all()


PICKED = {
    "text, dense k=9": (2, 13, 16, 136, 1, 9, False),
    "dense with residual": (2, 9, 136, 136, 1, 1, True),
    "grouped": (2, 11, 8, 8, 4, 7, True),
    "two outputs a block where all are made": (2, 9, 48, 48, 1, 7, True),
    "even kernel": (2, 6, 4, 4, 2, 4, True),
    "one token": (2, 1, 4, 4, 1, 3, True),
}


@pytest.mark.parametrize("count", ["one", "some"])
@pytest.mark.parametrize("shape", PICKED.values(), ids=PICKED)
def test_rows(shape: Shape, count: str, triton_device: torch.device) -> None:
    n, t = shape[:2]
    rows = make_rows(n, t, {"one": 1, "some": (t + 1) // 2}[count]).to(triton_device)
    assert_matches_eager(shape, make_case(shape, triton_device), rows=rows)


def test_places_that_were_not_asked_for_have_no_gradient_even_with_eps_0(triton_device: torch.device) -> None:
    shape = PICKED["grouped"]
    rows = make_rows(2, 11, 1).to(triton_device)
    assert_matches_eager(shape, make_case(shape, triton_device), rows=rows, eps=0.0)


def test_rows_in_fp16_and_in_int64(triton_device: torch.device) -> None:
    shape = PICKED["text, dense k=9"]
    rows = make_rows(2, 13, 6).to(triton_device)
    inputs = make_case(shape, triton_device, torch.float16)
    assert_matches_eager(shape, inputs, rows=rows)
    expected = values_and_gradients(op(shape, backend="triton", rows=rows), inputs)
    # int64, and not contiguous
    wide = rows.long().t().contiguous().t()
    for actual, same in zip(
        values_and_gradients(op(shape, backend="triton", rows=wide), inputs), expected, strict=True
    ):
        assert_bitwise_equal(actual, same)


FORMS: dict[str, tuple[Shape, Callable[[torch.device], Settings]]] = {
    "1d": ((2, 11, 24, 24, 1, 7, True), lambda device: {}),
    "2d": ((1, 2, 3, 8, 8, 2, 3, True), lambda device: {}),
    "dense": ((2, 5, 8, 136, 1, 3, False), lambda device: {}),
    "rows": ((2, 9, 8, 8, 2, 3, True), lambda device: {"rows": make_rows(2, 9, 4).to(device)}),
    "plan": ((2, 9, 8, 8, 2, 3, False), lambda device: {"plan": make_plan(2, 2, 9, 4).to(device)}),
}


def some_forms(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("shape", "settings"), [FORMS[name] for name in names], ids=names)


forms = pytest.mark.parametrize(("shape", "settings"), FORMS.values(), ids=FORMS)


@some_forms("1d", "dense")
def test_without_bias(
    shape: Shape, settings: Callable[[torch.device], Settings], triton_device: torch.device
) -> None:
    assert_matches_eager(shape, make_case(shape, triton_device)[:2], **settings(triton_device))


@some_forms("rows", "plan")
@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_each_gradient_alone(
    shape: Shape, settings: Callable[[torch.device], Settings], wanted: int, triton_device: torch.device
) -> None:
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(make_case(shape, triton_device))]
    assert_matches_eager(shape, inputs, **settings(triton_device))


@some_forms("2d", "plan")
def test_fp32_masters_keep_their_dtype(
    shape: Shape, settings: Callable[[torch.device], Settings], triton_device: torch.device
) -> None:
    inputs = make_case(shape, triton_device, torch.float16, masters=True)
    found = values_and_gradients(op(shape, backend="triton", **settings(triton_device)), inputs)
    assert [v.dtype for v in found] == [torch.float16] * 2 + [torch.float32] * 2
    assert_matches_eager(shape, inputs, **settings(triton_device))


def test_shares_of_the_weight_gradient(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 x 67 outputs in three shares of 45, 45 and 44: one block of 32 and a rest each
    monkeypatch.setattr(_taps_weight, "_LEAST_ROWS", 40)
    shape = (2, 67, 8, 8, 2, 1, False)
    inputs = make_case(shape, triton_device)
    with record_launches() as launches:
        assert_matches_eager(shape, inputs)
    sums = [launch for launch in launches if launch.kernel.__name__ == "taps_weight_kernel_sum"]
    assert [launch.args[2] for launch in sums] == [3]
    assert_repeats(op(shape, backend="triton"), inputs)


@forms
def test_repeats_bitwise_and_reads_no_uninitialised_memory(
    shape: Shape,
    settings: Callable[[torch.device], Settings],
    triton_device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    inputs, given = make_case(shape, triton_device), settings(triton_device)
    expected = values_and_gradients(op(shape, backend="triton", **given), inputs)
    request.getfixturevalue("poisoned_empty")
    for actual, clean in zip(
        values_and_gradients(op(shape, backend="triton", **given), inputs), expected, strict=True
    ):
        assert_bitwise_equal(actual, clean)


def test_nothing_is_written_past_the_end(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two outputs a block, and a line of odd length: the last block has one.
    shape = (2, 11, 24, 24, 1, 7, True)
    behind: list[Tensor] = []

    def with_room(make: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def allocate(*args: Any) -> tuple[Tensor, ...]:
            outputs = make(*args)
            rooms = [out.new_full((out.numel() + 256,), 7.0) for out in outputs]
            behind.extend(room[out.numel() :] for room, out in zip(rooms, outputs, strict=True))
            return tuple(
                room[: out.numel()].view(out.shape) for room, out in zip(rooms, outputs, strict=True)
            )

        return allocate

    for module, name in ((conv_block_fwd, "forward_outputs"), (conv_block_bwd, "backward_outputs")):
        monkeypatch.setattr(module, name, with_room(getattr(module, name)))
    with record_launches() as launches:
        assert_matches_eager(shape, make_case(shape, triton_device))
    spans = [launch.constexprs["SPAN"] for launch in launches if "BLOCK_K" in launch.constexprs]
    assert spans == [2, 2] and len(behind) == 5
    assert all((rest == 7.0).all() for rest in behind)


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        ((0, 5, 4, 4, 2, 3, True), {}, (0, 5, 4)),
        ((2, 0, 4, 4, 2, 3, True), {}, (2, 0, 4)),
        ((0, 3, 3, 4, 4, 2, 3, True), {}, (0, 3, 3, 4)),
        ((2, 5, 4, 4, 2, 3, True), {"rows": torch.zeros(2, 0, dtype=torch.int32)}, (2, 0, 4)),
        ((0, 5, 4, 4, 1, 3, True), {"rows": torch.zeros(0, 2, dtype=torch.int32)}, (0, 2, 4)),
    ],
    ids=["no samples", "no tokens", "no images", "no rows", "no samples, rows"],
)
def test_zero_size(
    shape: Shape, settings: Settings, expected: tuple[int, ...], triton_device: torch.device
) -> None:
    inputs = make_case(shape, triton_device)
    given = {name: value.to(triton_device) for name, value in settings.items()}
    out, *grads = values_and_gradients(op(shape, backend="triton", **given), inputs)
    assert out.shape == expected
    for grad, x in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@some_forms("dense", "rows")
def test_non_contiguous_inputs(
    shape: Shape, settings: Callable[[torch.device], Settings], triton_device: torch.device
) -> None:
    inputs, given = make_case(shape, triton_device), settings(triton_device)
    function = op(shape, backend="triton", **given)
    expected = values_and_gradients(function, inputs)
    for actual, clean in zip(
        values_and_gradients(function, [spread(x) for x in inputs]), expected, strict=True
    ):
        assert_bitwise_equal(actual, clean)
    # sum() makes a gradient whose strides are all zero
    out = function(*inputs)
    (dx,) = torch.autograd.grad(out.sum(), inputs[0], retain_graph=True)
    assert_bitwise_equal(dx, torch.autograd.grad(out, inputs[0], torch.ones_like(out))[0])


def test_a_large_mean_costs_no_digits(triton_device: torch.device) -> None:
    shape = (2, 9, 24, 24, 2, 3, True)
    x, weight, bias = make_case(shape, triton_device)
    assert_matches_eager(shape, [x, weight, (bias.detach() + 300).requires_grad_()])


@pytest.mark.parametrize("shape", [(1, 5, 8, 8, 2, 3, True), (1, 4, 4, 136, 1, 1, False)])
def test_eps(shape: Shape, triton_device: torch.device) -> None:
    inputs = [(v.detach() * 1e-2).requires_grad_() for v in make_case(shape, triton_device)]
    found = [
        values_and_gradients(op(shape, backend=backend, eps=eps), inputs)
        for eps in (1e-2, 1e-6)
        for backend in ("triton", "eager")
    ]
    for ours, theirs in (found[:2], found[2:]):
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0][0], found[2][0], atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 5, 48, 48, 1, 3, True), (1, 3, 16, 136, 1, 1, False)])
def test_every_candidate_of_the_tuner_gives_the_same(shape: Shape, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device, torch.float16)
    with record_choices() as choices:
        expected = values_and_gradients(op(shape, backend="triton"), inputs)
    assert {kernel for kernel, _ in choices} >= {"taps_tiles_kernel", "taps_weight_kernel"}
    for (kernel, bucket), candidates in choices.items():
        tiles = {tuple(v for k, v in c.items() if k.isupper()): c for c in candidates[1:]}
        for config in tiles.values():
            with forced(kernel, bucket, config):
                actual = values_and_gradients(op(shape, backend="triton"), inputs)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_refusals(triton_device: torch.device) -> None:
    x, w = torch.zeros(2, 3, 8, device=triton_device), torch.zeros(8, 4, 3, device=triton_device)
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        conv_block_1d(x.double(), w.double(), groups=2, backend="triton")
    if triton_device.type == "cpu":
        with pytest.raises(BackendError, match="Triton's interpreter is wrong in bf16"):
            conv_block_2d(x[None].bfloat16(), w[..., None].expand(-1, -1, -1, 3), groups=2, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 14, 14, 768, 768, 16, 3, True),
        (2, 16, 16, 1024, 1024, 16, 5, True),
        (3, 301, 768, 384, 16, 7, False),
        (3, 301, 384, 384, 16, 7, True),
        (2, 301, 768, 768, 16, 19, False),
        (2, 301, 768, 768, 1, 9, False),
    ],
    ids=["image base", "image large", "audio first", "audio", "positions", "text"],
)
def test_bf16_matches_eager(shape: Shape, masters: bool, triton_device: torch.device) -> None:
    assert_matches_eager(shape, make_case(shape, triton_device, torch.bfloat16, masters))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["rows", "plan"])
def test_bf16_forms_match_eager(form: str, triton_device: torch.device) -> None:
    shape = (3, 301, 768, 768, 1 if form == "rows" else 16, 9, False)
    given = make_rows(3, 301, 140) if form == "rows" else make_plan(3, 4, 301, 150)
    inputs = make_case(shape, triton_device, torch.bfloat16)
    assert_matches_eager(shape, inputs, **{form: given.to(triton_device)})


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "grouped"])
def test_offsets_beyond_two_to_the_31(groups: int, triton_device: torch.device) -> None:
    samples, length, channels = 64, 2**31 // (64 * 256) + 4, 256
    shape = (samples, length, channels, channels, groups, 3, True)
    x, weight, bias = make_case((1, 8, *shape[2:]), triton_device, torch.bfloat16)
    x = torch.randn(1, length, channels, device=triton_device, dtype=torch.bfloat16).repeat(samples, 1, 1)
    x.requires_grad_()
    function = op(shape, backend="triton")
    out = function(x, weight.detach(), bias.detach())
    last = x.detach()[-1:].requires_grad_()
    one = function(last, weight.detach(), bias.detach())
    assert_bitwise_equal(out[-1:], one)
    gradient = torch.randn_like(one)
    (dx,) = torch.autograd.grad(out, x, gradient.expand_as(out))
    assert_bitwise_equal(dx[-1:], torch.autograd.grad(one, last, gradient)[0])
