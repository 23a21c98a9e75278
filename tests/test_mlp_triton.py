"""Triton gelu_mlp beside eager: values, gradients, dropout bits, memory, launches, registration."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from d2vkern import BackendError, gelu_mlp  # noqa: E402
from d2vkern._nvtx import force_ranges, tally_costs  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402
from d2vkern.kernels._tuning import forced, record_choices  # noqa: E402
from d2vkern.reference._dropout import keep_mask  # noqa: E402
from d2vkern.testing import (  # noqa: E402
    assert_bitwise_equal,
    assert_no_worse_than_eager,
    backend_spy,
    peak_memory,
)

from .op_checks import assert_follows_autocast, assert_repeats, spread, values_and_gradients  # noqa: E402

SEED = 0x1234_5678_9ABC_DEF0
# leading sizes, D, F, O
Shape = tuple[tuple[int, ...], int, int, int]
SHAPES: dict[str, Shape] = {
    "block": ((3, 5), 8, 32, 8),
    "one row, four dimensions": ((1, 1, 1), 6, 24, 6),
    "no leading dimension": ((), 6, 24, 6),
    "output wider than hidden, rows in two shares": ((29,), 12, 5, 43),
    "primes, several tiles of columns": ((2, 3, 5), 7, 523, 13),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
forms = pytest.mark.parametrize("approximate", ["none", "tanh"])


def make_case(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32, masters: bool = False
) -> list[Tensor]:
    """x, w1, b1, w2, b2; masters: the parameters stay fp32."""
    rows, d, f, o = shape
    parameters = torch.float32 if masters else dtype
    made = [torch.randn(*rows, d).to(dtype)]
    made += [
        (torch.randn(size) * scale).to(parameters)
        for size, scale in (((f, d), d**-0.5), ((f,), 0.5), ((o, f), f**-0.5), ((o,), 0.5))
    ]
    return [value.to(device).requires_grad_() for value in made]


def op(backend: str, **settings: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        return gelu_mlp(x, w1, b1, w2, b2, backend=backend, **settings)

    return call


def assert_matches_eager(inputs: list[Tensor], **settings: Any) -> None:
    """Output and gradients: dtypes as eager's, error to fp64 at most twice eager's; and triton ran."""
    exact = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    with backend_spy() as calls:
        ours = values_and_gradients(op("triton", **settings), inputs)
    assert calls == [("mlp", "triton")]
    eager = values_and_gradients(op("eager", **settings), inputs)
    if isinstance(settings.get("seed"), Tensor):
        settings["seed"] = settings["seed"].cpu()
    for actual, same_dtype, reference in zip(
        ours, eager, values_and_gradients(op("eager", **settings), exact), strict=True
    ):
        assert_no_worse_than_eager(actual.cpu(), same_dtype.cpu(), reference)


@forms
@shapes
@dtypes
def test_matches_eager(
    shape: Shape, dtype: torch.dtype, approximate: str, triton_device: torch.device
) -> None:
    assert_matches_eager(make_case(shape, triton_device, dtype), approximate=approximate)


def test_fp32_masters_keep_their_dtype(triton_device: torch.device) -> None:
    inputs = make_case(((6, 16), 32, 64, 32), triton_device, torch.float16, masters=True)
    assert_matches_eager(inputs)
    out, dx, *parameters = values_and_gradients(op("triton"), inputs)
    assert {out.dtype, dx.dtype} == {torch.float16}
    assert {t.dtype for t in parameters} == {torch.float32}


@pytest.mark.parametrize("given", ["first", "second", "none"])
def test_biases_may_be_left_out(given: str, triton_device: torch.device) -> None:
    x, w1, b1, w2, b2 = make_case(SHAPES["block"], triton_device)
    chosen = {"first": [b1], "second": [b2], "none": []}[given]

    def run(backend: str) -> list[Tensor]:
        def call(x: Tensor, w1: Tensor, w2: Tensor, *biases: Tensor) -> Tensor:
            first, second = (biases[0] if given == which else None for which in ("first", "second"))
            return op(backend)(x, w1, first, w2, second)

        return values_and_gradients(call, [x, w1, w2, *chosen])

    for actual, expected in zip(run("triton"), run("eager"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", range(5), ids=["x", "w1", "b1", "w2", "b2"])
@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.5, "seed": 3}], ids=["plain", "dropout"])
def test_each_gradient_alone(wanted: int, settings: dict[str, Any], triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)
    assert_matches_eager([x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)], **settings)


@forms
def test_gelu_and_its_derivative_are_exact(approximate: str, triton_device: torch.device) -> None:
    points = torch.cat([torch.linspace(-9, 9, 2001), torch.tensor([0.0, -0.0, 1e-30, -100.0, 100.0])])
    x = points.to(triton_device).view(-1, 1).requires_grad_()
    one = torch.ones(1, 1, device=triton_device)
    out = op("triton", approximate=approximate)(x, one, None, one, None)
    (dx,) = torch.autograd.grad(out.sum(), x)
    exact = points.double().view(-1, 1).requires_grad_()
    expected = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    # as exact as fp32 erf
    assert ((out.cpu() - expected).abs() <= 4.4e-7 + expected.abs() * 2.0**-23).all()
    assert ((dx.cpu() - slope).abs() <= 4.4e-7).all()


def test_a_bias_that_cancels_leaves_no_rounding_behind(triton_device: torch.device) -> None:
    # 300.25 is no fp16 number; the bias must meet the product before that is rounded.
    x = torch.tensor([[300.0, 0.25]], dtype=torch.float16, device=triton_device)
    one, bias = torch.ones(1, 2, device=triton_device), torch.tensor([-300.0], device=triton_device)
    out = op("triton")(x, one, bias, one[:, :1], None)
    torch.testing.assert_close(out.float().item(), F.gelu(torch.tensor(0.25)).item(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("hidden", [32, 11, 264], ids=["whole counters", "counters across rows", "two tiles"])
def test_drops_what_eager_drops(hidden: int, triton_device: torch.device) -> None:
    inputs = make_case(((8, 18), 64, hidden, 8), triton_device)
    seed = torch.tensor(SEED, device=triton_device)
    assert_matches_eager(inputs, dropout_p=0.3, seed=seed)
    # With w2 the identity the output is the dropped activation; its gradient to x would mix columns.
    x, w1, b1, *_ = inputs
    identity = torch.eye(hidden, device=triton_device)
    out, dw2 = values_and_gradients(
        lambda w2: op("triton", dropout_p=0.3, seed=SEED)(x.detach(), w1.detach(), b1.detach(), w2, None),
        [identity.requires_grad_()],
    )
    keep = keep_mask(out.shape, 0.3, triton_device, SEED)
    assert torch.equal(out != 0, keep)
    assert dw2.isfinite().all()


def test_a_seed_is_the_same_as_int_and_tensor(triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)
    seed = torch.tensor(-5, device=triton_device)
    first = values_and_gradients(op("triton", seed=-5, dropout_p=0.3), inputs)
    for actual, expected in zip(
        values_and_gradients(op("triton", seed=seed, dropout_p=0.3), inputs), first, strict=True
    ):
        assert_bitwise_equal(actual, expected)
    assert not torch.equal(op("triton", seed=seed + 1, dropout_p=0.3)(*inputs), first[0])


def test_unseeded_dropout_follows_torchs_generator(triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)

    def run() -> list[Tensor]:
        return values_and_gradients(op("triton", dropout_p=0.4), inputs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    for actual, expected in zip(run(), first, strict=True):
        assert_bitwise_equal(actual, expected)
    assert not torch.equal(first[0], second[0])


def test_unseeded_dropout_has_one_mask_forward_and_backward(triton_device: torch.device) -> None:
    x, w1, b1, w2, _ = make_case(SHAPES["block"], triton_device)
    out = op("triton", dropout_p=0.4)(x, w1, b1, w2, None)
    # The output is linear in w2: <dw2, w2> is the sum of the output only under the forward's mask.
    (dw2,) = torch.autograd.grad(out.sum(), w2)
    torch.testing.assert_close((dw2 * w2).sum(), out.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [None, 5], ids=["drawn", "given"])
def test_checkpointing_repeats_the_same_dropout(seed: int | None, triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)
    call = op("triton", dropout_p=0.4, seed=seed)
    torch.manual_seed(1)
    expected = values_and_gradients(call, inputs)
    torch.manual_seed(1)
    actual = values_and_gradients(lambda *v: checkpoint(call, *v, use_reentrant=False), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.3, "seed": 4}], ids=["plain", "dropout"])
def test_repeats_bitwise_and_leaves_inputs_alone(
    settings: dict[str, Any], triton_device: torch.device
) -> None:
    # 111 rows in seven shares, each with a partial sum
    assert_repeats(op("triton", **settings), make_case(((3, 37), 5, 8, 3), triton_device))


@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.3, "seed": 4}], ids=["plain", "dropout"])
def test_nothing_reads_uninitialised_memory(
    settings: dict[str, Any], triton_device: torch.device, request: pytest.FixtureRequest
) -> None:
    inputs = make_case(((3, 12), 5, 9, 3), triton_device)
    expected = values_and_gradients(op("triton", **settings), inputs)
    request.getfixturevalue("poisoned_empty")
    for actual, clean in zip(values_and_gradients(op("triton", **settings), inputs), expected, strict=True):
        assert_bitwise_equal(actual, clean)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("rows", [(0, 4), (3, 0)], ids=["no samples", "no tokens"])
def test_zero_size(rows: tuple[int, ...], dropout_p: float, triton_device: torch.device) -> None:
    inputs = make_case((rows, 6, 12, 5), triton_device)
    out, *grads = values_and_gradients(op("triton", dropout_p=dropout_p), inputs)
    assert out.shape == (*rows, 5)
    for grad, x in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_non_contiguous_inputs(triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)
    expected = values_and_gradients(op("triton"), inputs)
    strided = [spread(x) for x in inputs]
    for actual, clean in zip(values_and_gradients(op("triton"), strided), expected, strict=True):
        torch.testing.assert_close(actual, clean, rtol=1e-5, atol=1e-6)
    # sum() makes a gradient whose strides are all zero
    out = op("triton")(*inputs)
    (db2,) = torch.autograd.grad(out.sum(), inputs[4], retain_graph=True)
    assert torch.equal(db2, torch.full_like(db2, 15))
    (dx,) = torch.autograd.grad(out.sum(), inputs[0], retain_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(out, inputs[0], torch.ones_like(out))[0])


def test_every_candidate_of_the_tuner_gives_the_same(triton_device: torch.device) -> None:
    inputs = make_case(((3, 7), 5, 72, 3), triton_device)
    with record_choices() as choices:
        expected = values_and_gradients(op("triton", dropout_p=0.3, seed=1), inputs)
    assert {kernel for kernel, _ in choices} == {"mlp_fwd_kernel", "mlp_bwd_kernel_hidden"}
    for (kernel, bucket), candidates in choices.items():
        tiles = {config.get("BLOCK", config.get("BLOCK_R")): config for config in candidates}
        for config in tiles.values():
            with forced(kernel, bucket, config):
                actual = values_and_gradients(op("triton", dropout_p=0.3, seed=1), inputs)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_launches(triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)
    with record_launches() as forward:
        out = op("triton")(*inputs)
    with record_launches() as backward:
        out.sum().backward()
    with record_launches() as inference, torch.no_grad():
        op("triton")(*inputs)
    names = [[launch.kernel.__name__ for launch in some] for some in (forward, backward, inference)]
    assert names == [["mlp_fwd_kernel"], ["mlp_bwd_kernel_hidden", "column_sums_kernel"], ["mlp_fwd_kernel"]]
    # without gradients the activation is written over the pre-activation, in backward dpre over dact
    in_place = [launch.args[0] is launch.args[1] for launch in (*forward, *inference)]
    assert in_place == [False, True]
    assert backward[0].args[0] is backward[0].args[2]


def test_memory(triton_device: torch.device) -> None:
    if triton_device.type != "cpu":
        pytest.skip("counts the CPU allocator's bytes")
    inputs = make_case(((64,), 4, 4096, 4), triton_device)
    hidden, small = 64 * 4096 * 4, 1 << 18
    with torch.no_grad():
        assert peak_memory(lambda: op("triton")(*inputs)) < hidden + small
    assert peak_memory(lambda: op("triton")(*inputs)) < 2 * hidden + small
    out = op("triton")(*inputs)
    dout = torch.ones_like(out)
    assert peak_memory(lambda: torch.autograd.grad(out, inputs, dout)) < 2 * hidden + 2 * small


def test_ranges(triton_device: torch.device) -> None:
    inputs = make_case(SHAPES["block"], triton_device)
    with force_ranges(True), tally_costs() as tallies:
        values_and_gradients(op("triton"), inputs)
    rows, d, f, o, item = 15, 8, 32, 8, 4
    weights, product = (f * d + f + o * f + o) * item, 2 * rows * f * (d + o)
    found = {name: (tally.calls, tally.bytes, tally.flops) for name, tally in tallies.items()}
    assert found == {
        "mlp/fwd/triton": (1, rows * (d + 3 * f + o) * item + weights, product),
        "mlp/bwd/triton": (1, rows * (2 * d + 4 * f + 2 * o) * item + 2 * weights, 2 * product),
    }


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(p: float, save: bool, triton_device: torch.device) -> None:
    x, *parameters = (v.detach() for v in make_case(((2, 5), 8, 16, 4), triton_device))
    seed = torch.tensor(3, device=triton_device) if p else None
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    forward = (x, *parameters, seed, p, True, save)
    torch.library.opcheck(torch.ops.d2vkern.mlp_fwd.default, forward)
    if save:
        y, pre = torch.ops.d2vkern.mlp_fwd(*forward)
        for needs in ([True] * 5, [False, False, True, False, False], [False] * 4 + [True]):
            torch.library.opcheck(
                torch.ops.d2vkern.mlp_bwd.default, (y, x, pre, *parameters, seed, p, True, needs)
            )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.3, "seed": 3}], ids=["plain", "dropout"])
def test_compiles(dynamic: bool, settings: dict[str, Any], triton_device: torch.device) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op("triton", **settings), fullgraph=True, backend=graphs, dynamic=dynamic)
    compiled_after = set()
    for tokens in (5, 11) if dynamic else (5,):
        inputs = make_case(((3, tokens), 8, 16, 4), triton_device)
        expected = values_and_gradients(op("triton", **settings), inputs)
        for ours, theirs in zip(values_and_gradients(compiled, inputs), expected, strict=True):
            assert_bitwise_equal(ours, theirs)
        compiled_after.add(graphs.frame_count)
    assert len(compiled_after) == 1
    with torch.no_grad():
        assert_bitwise_equal(compiled(*inputs), expected[0])
    torch._dynamo.reset()


def test_follows_autocast(triton_device: torch.device) -> None:
    assert_follows_autocast(op("triton"), make_case(SHAPES["block"], triton_device))


def test_refusals(triton_device: torch.device) -> None:
    x, *parameters = (v.detach() for v in make_case(SHAPES["block"], triton_device))
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        op("triton")(x.double(), *parameters)
    if triton_device.type == "cpu":
        with pytest.raises(BackendError, match="Triton's interpreter is wrong in bf16"):
            op("triton")(x.bfloat16(), *parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("masters", [False, True], ids=["one dtype", "fp32 masters"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_bf16_matches_eager(masters: bool, dropout_p: float, triton_device: torch.device) -> None:
    inputs = make_case(((7, 301), 768, 3072, 768), triton_device, torch.bfloat16, masters)
    assert_matches_eager(inputs, dropout_p=dropout_p, seed=torch.tensor(SEED, device=triton_device))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(triton_device: torch.device) -> None:
    hidden = 4096
    rows = 2**31 // hidden + 64
    x = torch.randn(64, 8, device=triton_device, dtype=torch.bfloat16).repeat(rows // 64, 1)
    _, *parameters = make_case(((1,), 8, hidden, 8), triton_device, torch.bfloat16)
    x.requires_grad_()
    out, dx, *_ = values_and_gradients(lambda x: op("triton")(x, *(p.detach() for p in parameters)), [x])
    last = values_and_gradients(
        lambda x: op("triton")(x, *(p.detach() for p in parameters)), [x.detach()[-64:].requires_grad_()]
    )[0]
    torch.testing.assert_close(out[-64:], last, rtol=2e-2, atol=2e-2)
    assert dx.isfinite().all() and (dx[-64:] != 0).any()


@pytest.mark.gpu
def test_a_replayed_graph_draws_anew(triton_device: torch.device) -> None:
    inputs = make_case(((8, 50), 768, 3072, 768), triton_device, torch.bfloat16)
    seed = torch.tensor(3, device=triton_device)

    def step() -> list[Tensor]:
        out = op("triton", dropout_p=0.3, seed=seed)(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, inputs[0].detach())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            assert_bitwise_equal(actual, expected)
