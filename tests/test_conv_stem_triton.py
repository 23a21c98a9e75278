"""Triton conv_stem beside eager: values, gradients, what is kept, launches, registration, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from d2vkern import BackendError, _backend, _cpu, conv_stem, use_backend  # noqa: E402
from d2vkern._nvtx import force_ranges, tally_costs  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402
from d2vkern.kernels._tuning import forced, record_choices  # noqa: E402
from d2vkern.testing import (  # noqa: E402
    assert_bitwise_equal,
    assert_no_worse_than_eager,
    backend_spy,
    live_memory,
)

from .op_checks import assert_follows_autocast, assert_repeats, spread, values_and_gradients  # noqa: E402

# B, T, C, O, kernel, stride
Shape = tuple[int, int, int, int, int, int]
SHAPES: dict[str, Shape] = {
    # the seven layers of the speech encoder, shrunk: the first, four and two
    "layer 0": (2, 103, 1, 32, 10, 5),
    "layers 1 to 4": (2, 45, 32, 32, 3, 2),
    "layers 5 and 6": (2, 22, 32, 32, 2, 2),
    "primes": (3, 29, 7, 13, 5, 3),
    "kernel no multiple of the stride": (2, 31, 16, 24, 5, 2),
    "kernel shorter than the stride": (2, 33, 16, 16, 2, 5),
    "a stride beyond the signal": (2, 4, 8, 16, 3, 7),
    "stride 1": (1, 12, 16, 16, 4, 1),
    "one frame": (2, 3, 16, 16, 3, 2),
    "one frame of one sample": (1, 10, 1, 16, 10, 5),
    "one output channel": (2, 9, 4, 1, 2, 2),  # variance 0
    "several tiles each way": (1, 136, 24, 72, 3, 2),
    "wave of three channels": (2, 23, 3, 20, 5, 2),
    "wave of several tiles and shares": (2, 150, 1, 66, 7, 2),
    "wave, last tile not full, one row": (1, 7, 1, 67, 7, 3),
}
WAVES = [name for name, (_, _, c, _, k, _) in SHAPES.items() if c * k <= 16]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
PLAIN, WAVE = SHAPES["kernel no multiple of the stride"], SHAPES["wave of several tiles and shares"]
kinds = pytest.mark.parametrize("shape", [PLAIN, WAVE], ids=["kept product", "wave"])


def make_case(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    masters: bool = False,
    into_x: bool | None = None,
) -> list[Tensor]:
    """x, weight, norm_weight, norm_bias; masters: the parameters stay fp32; x of a wave wants no gradient."""
    b, t, c, o, k, _ = shape
    parameters = torch.float32 if masters else dtype
    into_x = c * k > 16 if into_x is None else into_x
    made = [torch.randn(b, t, c).to(dtype), (torch.randn(o, c, k) * (c * k) ** -0.5).to(parameters)]
    made += [(1 + 0.3 * torch.randn(o)).to(parameters), (0.3 * torch.randn(o)).to(parameters)]
    return [value.to(device).requires_grad_(into_x or i > 0) for i, value in enumerate(made)]


def op(backend: str, stride: int, eps: float = 1e-5) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return conv_stem(x, weight, stride, norm_weight, norm_bias, eps, backend=backend)

    return call


def assert_matches_eager(inputs: list[Tensor], stride: int, eps: float = 1e-5, factor: float = 2.0) -> None:
    """Output and gradients: dtypes as eager's, error to fp64 at most `factor` of eager's; and triton ran."""
    exact = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    with backend_spy() as calls:
        ours = values_and_gradients(op("triton", stride, eps), inputs)
    assert calls == [("conv_stem", "triton")]
    eager = values_and_gradients(op("eager", stride, eps), inputs)
    for actual, same_dtype, reference in zip(
        ours, eager, values_and_gradients(op("eager", stride, eps), exact), strict=True
    ):
        if actual.is_cuda and inputs[1].shape[0] == 1:
            # a norm over one value has gradient 0, next to which every rounding of a GPU is large
            torch.testing.assert_close(actual.cpu().double(), reference, rtol=1e-5, atol=1e-5)
        else:
            assert_no_worse_than_eager(actual.cpu(), same_dtype.cpu(), reference, factor)


def assert_equals_without_gradients(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit in the interpreter; a GPU's compiler makes other multiply-adds of the two kernels."""
    if actual.is_cuda:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        assert_bitwise_equal(actual, expected)


@shapes
@dtypes
def test_matches_eager(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    assert_matches_eager(make_case(shape, triton_device, dtype), shape[-1])


@pytest.mark.parametrize("name", WAVES)
def test_a_wave_that_wants_a_gradient(name: str, triton_device: torch.device) -> None:
    assert_matches_eager(make_case(SHAPES[name], triton_device, into_x=True), SHAPES[name][-1])


@kinds
@dtypes
def test_fp32_masters_keep_their_dtype(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device, dtype, masters=True)
    assert_matches_eager(inputs, shape[-1])
    out, *gradients = values_and_gradients(op("triton", shape[-1]), inputs)
    assert out.dtype == dtype
    assert {g.dtype for g in gradients[-3:]} == {torch.float32}


@pytest.mark.parametrize("wanted", range(4), ids=["x", "weight", "norm_weight", "norm_bias"])
@kinds
def test_each_gradient_alone(shape: Shape, wanted: int, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device)
    chosen = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    assert_matches_eager(chosen, shape[-1])


@kinds
def test_all_but_one_gradient(shape: Shape, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device)
    for left_out in (2, 3):
        inputs = [x.detach().requires_grad_(i not in (0, left_out)) for i, x in enumerate(inputs)]
        assert_matches_eager(inputs, shape[-1])


@kinds
@dtypes
def test_a_large_mean_costs_no_digits(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    x, weight, *rest = make_case(shape, triton_device, dtype)
    # all output channels see nearly the same filter: their mean is large beside their spread
    weight = (weight.detach() * 0.1 + 1).requires_grad_()
    # on a GPU the wave's moments, made of products, are a little behind sums over outputs
    assert_matches_eager([x, weight, *rest], shape[-1], factor=3.0 if x.is_cuda else 2.0)


def test_smooth_waves_lose_no_digits(triton_device: torch.device) -> None:
    # Neighbouring samples nearly cancel under filters without a mean, as those that a speech model learns.
    _, weight, *rest = make_case((1, 10, 1, 24, 10, 5), triton_device, torch.float16)
    wave = torch.sin(torch.arange(500) * 0.05) + 0.01 * torch.randn(500)
    x = wave.half().to(triton_device).view(1, 500, 1)
    weight = (weight.detach() - weight.detach().mean(2, keepdim=True)).requires_grad_()
    assert_matches_eager([x, weight, *rest], 5)
    # a quiet one: rstd is large, and rstd^2 times a gradient leaves fp16's range
    assert_matches_eager([x * 1e-3, weight, *rest], 5, 1e-9)


@kinds
def test_eps(shape: Shape, triton_device: torch.device) -> None:
    x, *parameters = make_case(shape, triton_device)
    for eps in (1e-2, 1e-6):
        actual, expected = (
            values_and_gradients(op(backend, shape[-1], eps), [x * 1e-2, *parameters])
            for backend in ("triton", "eager")
        )
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_samples_left_over_have_no_gradient(triton_device: torch.device) -> None:
    shape = SHAPES["kernel shorter than the stride"]
    inputs = make_case(shape, triton_device)
    dx = values_and_gradients(op("triton", shape[-1]), inputs)[1]
    covered = torch.zeros(shape[1], dtype=torch.bool)
    for frame in range((shape[1] - 2) // 5 + 1):
        covered[frame * 5 : frame * 5 + 2] = True
    assert (dx[:, ~covered] == 0).all() and (dx[:, covered] != 0).all()


@kinds
def test_repeats_bitwise_and_leaves_inputs_alone(shape: Shape, triton_device: torch.device) -> None:
    assert_repeats(op("triton", shape[-1]), make_case(shape, triton_device))


@pytest.mark.parametrize("shape", [PLAIN, WAVE, SHAPES["kernel shorter than the stride"]])
def test_nothing_reads_uninitialised_memory(
    shape: Shape, triton_device: torch.device, request: pytest.FixtureRequest
) -> None:
    inputs = make_case(shape, triton_device)
    expected = values_and_gradients(op("triton", shape[-1]), inputs)
    request.getfixturevalue("poisoned_empty")
    with torch.no_grad():
        assert_equals_without_gradients(op("triton", shape[-1])(*inputs), expected[0])
    for actual, clean in zip(values_and_gradients(op("triton", shape[-1]), inputs), expected, strict=True):
        assert_bitwise_equal(actual, clean)


@pytest.mark.parametrize("channels", [1, 8], ids=["wave", "kept product"])
def test_no_samples(channels: int, triton_device: torch.device) -> None:
    inputs = make_case((0, 23, channels, 6, 3, 2), triton_device)
    out, *gradients = values_and_gradients(op("triton", 2), inputs)
    assert out.shape == (0, 11, 6)
    for gradient, x in zip(gradients, [x for x in inputs if x.requires_grad], strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@kinds
def test_strides(shape: Shape, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device)
    call = op("triton", shape[-1])
    expected = values_and_gradients(call, inputs)
    for actual, clean in zip(values_and_gradients(call, [spread(x) for x in inputs]), expected, strict=True):
        assert_bitwise_equal(actual, clean)
    # a slice of a longer signal
    longer = torch.cat([inputs[0], inputs[0]], 1).detach()[:, 3 : 3 + shape[1]]
    torch.testing.assert_close(call(longer, *inputs[1:]), op("eager", shape[-1])(longer, *inputs[1:]))
    # gradients with strides of zero, and of another order
    out = call(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    for dout in (torch.ones(1, device=triton_device).expand(out.shape), spread(out.detach())):
        ours = torch.autograd.grad(out, wanted, dout, retain_graph=True)
        theirs = torch.autograd.grad(out, wanted, dout.contiguous(), retain_graph=True)
        for actual, clean in zip(ours, theirs, strict=True):
            assert_bitwise_equal(actual, clean)


@kinds
def test_every_candidate_of_the_tuner_gives_the_same(shape: Shape, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device)
    call = op("triton", shape[-1])
    with record_choices() as choices:
        expected = values_and_gradients(call, inputs)
    directions = ("fwd", "bwd")
    kernels = (
        {f"conv_stem_{direction}_kernel_wave" for direction in directions}
        if shape is WAVE
        else {"conv_stem_fwd_kernel", *(f"conv_stem_bwd_kernel_{n}" for n in ("norm", "input", "weight"))}
    )
    assert {kernel for kernel, _ in choices} == kernels
    for (kernel, bucket), candidates in choices.items():
        tiles = {str({k: v for k, v in c.items() if k.isupper()}): c for c in candidates}
        for config in list(tiles.values())[1:]:
            with forced(kernel, bucket, config):
                actual = values_and_gradients(call, inputs)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _names(run: Callable[[], object]) -> list[str]:
    with record_launches() as launches:
        run()
    return [launch.kernel.__name__.removeprefix("conv_stem_") for launch in launches]


def test_launches(triton_device: torch.device) -> None:
    for shape, forward in ((PLAIN, "fwd_kernel"), (WAVE, "fwd_kernel_wave")):
        inputs = make_case(shape, triton_device)
        call = op("triton", shape[-1])
        assert _names(lambda: call(*inputs)) == [forward]  # noqa: B023
        with torch.no_grad():
            assert _names(lambda: call(*inputs)) == [forward]  # noqa: B023
    wave = op("triton", WAVE[-1])(*inputs).sum()
    kernels = ["bwd_kernel_wave", "bwd_kernel_wave_squares", "column_sums_kernel", "bwd_kernel_wave_finish"]
    assert _names(wave.backward) == kernels
    inputs = make_case(PLAIN, triton_device)
    out = op("triton", PLAIN[-1])(*inputs).sum()
    norm, into_x = ["bwd_kernel_norm", "column_sums_kernel"], ["bwd_kernel_input"]
    weight = ["bwd_kernel_weight", "bwd_kernel_sum"]
    assert _names(lambda: out.backward(retain_graph=True)) == [*norm, *into_x, *weight]
    for wanted, expected in ((0, [norm[0], *into_x]), (1, [norm[0], *weight]), (2, norm), (3, norm)):
        chosen = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        assert _names(op("triton", PLAIN[-1])(*chosen).sum().backward) == expected
    # the product of a kept layer is y's memory where nothing has to be kept
    with record_launches() as launches, torch.no_grad():
        op("triton", PLAIN[-1])(*inputs)
    assert launches[0].args[4] is launches[0].args[5]


def test_what_is_held_for_backward(triton_device: torch.device) -> None:
    if triton_device.type != "cpu":
        pytest.skip("counts the CPU allocator's bytes")
    for shape, times in (((1, 402, 1, 64, 10, 5), 1), ((1, 160, 32, 64, 3, 2), 2)):
        inputs = make_case(shape, triton_device)
        out, held = live_memory(lambda: op("triton", shape[-1])(*inputs))  # noqa: B023
        statistics = 8 * out.shape[1]
        assert times * out.nbytes + statistics <= held < times * out.nbytes + statistics + 1024


def test_ranges(triton_device: torch.device) -> None:
    b, t, c, o, k, stride = PLAIN
    inputs = make_case(PLAIN, triton_device)
    frames = (t - k) // stride + 1
    with force_ranges(True), tally_costs() as tallies:
        values_and_gradients(op("triton", stride), inputs)
    x, y, weights, flops = b * t * c, b * frames * o, o * c * k + 2 * o, 2 * b * frames * o * c * k
    found = {name: (tally.calls, tally.bytes, tally.flops) for name, tally in tallies.items()}
    assert found == {
        "conv_stem/fwd/triton": (1, 4 * (x + weights + 2 * y), flops),
        "conv_stem/bwd/triton": (1, 4 * (2 * x + 2 * weights + 2 * y), 2 * flops),
    }


@kinds
def test_opcheck(shape: Shape, triton_device: torch.device) -> None:
    x, *parameters = (v.detach() for v in make_case(shape, triton_device))
    weight, norm_weight, norm_bias = parameters
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for save, into_x in ((False, False), (True, False), (True, True)):
        forward = (x, weight, shape[-1], norm_weight, norm_bias, 1e-5, save, into_x)
        torch.library.opcheck(torch.ops.d2vkern.conv_stem_fwd.default, forward)
        if save:
            y, *saved = torch.ops.d2vkern.conv_stem_fwd(*forward)
            for needs in ([into_x, True, True, True], [False, True, False, True]):
                backward = (y, x, *saved, weight, shape[-1], norm_weight, norm_bias, needs)
                torch.library.opcheck(torch.ops.d2vkern.conv_stem_bwd.default, backward)


@kinds
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles(shape: Shape, dynamic: bool, triton_device: torch.device) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    call = op("triton", shape[-1])
    compiled = torch.compile(call, fullgraph=True, backend=graphs, dynamic=dynamic)
    compiled_after = set()
    for length in (31, 43) if dynamic else (31,):
        inputs = make_case((3, length, *shape[2:]), triton_device)
        expected = values_and_gradients(call, inputs)
        for ours, theirs in zip(values_and_gradients(compiled, inputs), expected, strict=True):
            assert_bitwise_equal(ours, theirs)
        compiled_after.add(graphs.frame_count)
    assert len(compiled_after) == 1
    with torch.no_grad():
        assert_equals_without_gradients(compiled(*inputs), expected[0])
    torch._dynamo.reset()


@kinds
def test_autocast_and_checkpointing(shape: Shape, triton_device: torch.device) -> None:
    inputs = make_case(shape, triton_device)
    call = op("triton", shape[-1])
    expected = values_and_gradients(call, inputs)
    again = values_and_gradients(lambda *v: checkpoint(call, *v, use_reentrant=False), inputs)
    for repeated, theirs in zip(again, expected, strict=True):
        assert_bitwise_equal(repeated, theirs)
    assert_follows_autocast(call, inputs)


def test_refusals(triton_device: torch.device) -> None:
    x, *parameters = (v.detach() for v in make_case(PLAIN, triton_device))
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        op("triton", 2)(x.double(), *parameters)
    if triton_device.type == "cpu":
        with pytest.raises(BackendError, match="Triton's interpreter is wrong in bf16"):
            op("triton", 2)(x.bfloat16(), *parameters)


def test_auto_chooses_eager_in_fp32_and_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *parameters = make_case(PLAIN, torch.device("cpu"))
    monkeypatch.setattr(_backend, "gaps", lambda *args: [])  # as on a GPU that takes everything
    monkeypatch.setattr(_cpu, "mkl_leaves_units_idle", lambda: False)
    for device in ("cpu", "meta"):
        with backend_spy() as calls:
            conv_stem(x.to(device), parameters[0].to(device), 2, *(p.to(device) for p in parameters[1:]))
        assert calls == [("conv_stem", "eager")]
    with FakeTensorMode():
        for dtype, expected in ((torch.float32, "eager"), (torch.bfloat16, "triton")):
            fake = torch.empty(2, 9, 1, device="cuda", dtype=dtype)
            assert _backend._choose("conv_stem", (fake,), {}) == expected
    with use_backend("triton"), backend_spy() as calls:
        conv_stem(x, parameters[0], 2, *parameters[1:])
    assert calls == [("conv_stem", "triton")]


GPU_SHAPES: dict[str, Shape] = {
    "layer 0": (2, 16_000, 1, 512, 10, 5),
    "layer 1": (2, 3_199, 512, 512, 3, 2),
    "layer 5": (2, 199, 512, 512, 2, 2),
    "large tiles": (9, 6_000, 512, 512, 3, 2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_bf16_matches_eager(shape: Shape, masters: bool, triton_device: torch.device) -> None:
    assert_matches_eager(make_case(shape, triton_device, torch.bfloat16, masters), shape[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 512], ids=["layer 0", "layer 1"])
def test_offsets_beyond_two_to_the_31(channels: int, triton_device: torch.device) -> None:
    kernel, stride, tail = (10, 5, 50) if channels == 1 else (3, 2, 21)
    frames = 2**31 // 512 + 100
    length = (frames - 1) * stride + kernel
    x = torch.randn(1, length, channels, device=triton_device, dtype=torch.bfloat16)
    parameters = make_case((1, kernel, channels, 512, kernel, stride), triton_device, torch.bfloat16)[1:]
    x.requires_grad_(channels > 1)
    out = op("triton", stride)(x, *parameters)
    last = op("eager", stride)(x.detach()[:, -tail:], *(p.detach() for p in parameters))
    torch.testing.assert_close(out[:, -last.shape[1] :], last, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(out, [v for v in (x, *parameters) if v.requires_grad], out.detach())
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients)
    if channels > 1:
        assert (gradients[0][:, -tail:] != 0).any()
