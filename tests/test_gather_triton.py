"""Triton gather and scatter against eager: the same bits, but for the normals and sums over all rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2vkern import MaskPlan, _nvtx, gather_tokens, random_mask, scatter_tokens
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

pytest.importorskip("triton")
from d2vkern.kernels import gather as kernels  # noqa: E402
from d2vkern.kernels import gather_fwd  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("x", "extra", "positions", "per_mask")

# name: samples B, clones M, tokens T, kept K, width D, extra tokens E
SHAPES = {
    "image": (2, 4, 10, 3, 16, 1),
    "audio, no extra tokens": (1, 3, 9, 5, 64, 0),
    "primes, two extra tokens": (3, 5, 7, 3, 7, 2),
    "several blocks and chunks": (1, 2, 10, 8, 384, 1),
    "a chunk that ends beyond the width": (1, 1, 3, 2, 300, 1),
    "more samples than a partial sum takes": (6, 1, 3, 2, 8, 1),
    "one token kept": (2, 2, 5, 1, 12, 1),
    "nothing masked": (2, 2, 5, 5, 12, 1),
    "everything masked": (2, 2, 5, 0, 12, 1),
    "nothing to write": (2, 2, 5, 0, 12, 0),
    "a single token": (1, 1, 1, 1, 4, 0),
    "no samples": (0, 3, 5, 2, 8, 1),
    "no width": (2, 2, 5, 2, 0, 1),
}


def make_plan(B: int, M: int, T: int, K: int, device: torch.device) -> MaskPlan:
    mask = torch.ones(B * M, T, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(T)[:K]] = False
    if B == 0:  # from_mask would find nothing kept
        slot, ids_keep = (torch.empty(0, size, dtype=torch.int32) for size in (T, K))
        return MaskPlan(mask, ids_keep, slot, M).to(device)
    return MaskPlan.from_mask(mask, M).to(device)


def make_inputs(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[MaskPlan, dict[str, Tensor]]:
    B, M, T, K, D, E = SHAPES[shape]
    sizes = {"x": (B, T, D), "extra": (E, D), "positions": (T, D), "per_mask": (B * M, T, D)}
    tensors = {name: torch.randn(size).to(device, dtype) for name, size in sizes.items()}
    return make_plan(B, M, T, K, device), tensors


def gradients(
    plan: MaskPlan, tensors: dict[str, Tensor], backend: str, dout: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradient of each tensor, all in the gradient's dtype."""
    leaves = {name: tensor.detach().to(dout.dtype).requires_grad_() for name, tensor in tensors.items()}
    out = gather_tokens(plan=plan, **leaves, backend=backend)
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out, leaves.values(), dout), strict=True))


def output_gradient(plan: MaskPlan, tensors: dict[str, Tensor]) -> Tensor:
    """Random eighths, small enough that fp32 sums of them are exact in any order."""
    x, extra = tensors["x"], tensors["extra"]
    size = (plan.mask.shape[0], extra.shape[0] + plan.kept, x.shape[2])
    return (torch.randint(-16, 17, size) / 8).to(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_equals_eager(shape, dtype, triton_device, poisoned_empty):
    plan, tensors = make_inputs(shape, dtype, triton_device)
    for names in (("x",), ("x", "positions"), ("x", "extra", "per_mask"), NAMES):
        given = {name: tensors[name] for name in names}
        with backend_spy() as calls:
            out = gather_tokens(plan=plan, **given, backend="triton")
        assert calls == [("gather", "triton")]
        assert_bitwise_equal(out, gather_tokens(plan=plan, **given, backend="eager"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_gradients_equal_eager(shape, dtype, triton_device, poisoned_empty):
    plan, tensors = make_inputs(shape, dtype, triton_device)
    dout = output_gradient(plan, tensors)
    _, ours = gradients(plan, tensors, "triton", dout)
    _, eager = gradients(plan, tensors, "eager", dout)
    for name in NAMES:
        assert ours[name].is_contiguous()
        assert_bitwise_equal(ours[name], eager[name])


def test_rounding_of_gradients(triton_device):
    """Those of x and per_mask have eager's bits; those that sum over all rows have an order of their own."""
    plan = make_plan(8, 4, 4, 2, triton_device)
    sizes = {"x": (8, 4, 16), "extra": (1, 16), "positions": (4, 16), "per_mask": (32, 4, 16)}
    tensors = {name: torch.zeros(size, device=triton_device) for name, size in sizes.items()}
    dout = torch.randn(32, 3, 16).to(triton_device)
    _, ours = gradients(plan, tensors, "triton", dout)
    _, eager = gradients(plan, tensors, "eager", dout)
    _, exact = gradients(plan, tensors, "eager", dout.double())
    for name in ("x", "per_mask"):
        assert_bitwise_equal(ours[name], eager[name])
    for name in ("extra", "positions"):
        assert_no_worse_than_eager(ours[name], eager[name], exact[name])


def test_gradient_of_x_sums_in_clone_order(triton_device):
    plan = MaskPlan.from_mask(torch.zeros(64, 2, dtype=torch.bool), clones=64).to(triton_device)
    dout = torch.randn(64, 2, 4, device=triton_device)
    x = torch.zeros(1, 2, 4, device=triton_device, requires_grad=True)
    in_order = torch.zeros(2, 4, device=triton_device)
    for m in range(64):
        in_order += dout[m]
    (dx,) = torch.autograd.grad(gather_tokens(x, plan, backend="triton"), x, dout)
    assert_bitwise_equal(dx[0], in_order)
    # fp16 sums would lose each 1 beside 4096.
    half = torch.ones(64, 2, 4, dtype=torch.float16, device=triton_device)
    half[0] = 4096.0
    x, positions = (torch.zeros(s, dtype=torch.float16, device=triton_device) for s in ((1, 2, 4), (2, 4)))
    x.requires_grad_(), positions.requires_grad_()
    out = gather_tokens(x, plan, None, positions, backend="triton")
    for grad in torch.autograd.grad(out, (x, positions), half):
        assert (grad == torch.tensor(4096.0 + 63.0).half().item()).all()


def launched(function) -> list[str]:
    with record_launches() as launches:
        function()
    return [launch.kernel.__name__ for launch in launches]


def test_launches_only_what_is_wanted(triton_device):
    plan, tensors = make_inputs("image", torch.float32, triton_device)
    rows, sums = "gather_bwd_kernel_rows", "column_sums_kernel"
    wanted = {("x",): [rows], ("per_mask",): [rows], ("x", "per_mask"): [rows], ("extra",): [rows, sums]}
    wanted |= {("positions",): [rows, sums], NAMES: [rows, sums]}
    for names, expected in wanted.items():
        given = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
        with record_launches() as forward:
            out = gather_tokens(plan=plan, **given, backend="triton")
        assert len(forward) == 1
        assert launched(lambda out=out: out.backward(torch.ones_like(out))) == expected
        assert [name for name in NAMES if given[name].grad is not None] == [n for n in NAMES if n in names]
    # For the extra tokens alone no program goes through the others.
    extra = torch.zeros(1, 16, device=triton_device, requires_grad=True)
    with record_launches() as launches:
        gather_tokens(tensors["x"], plan, extra, backend="triton").sum().backward()
    assert launches[1].grid[0] == 1 and extra.grad.eq(8).all()


def test_scatter_launches_once_each_way(triton_device):
    plan, _ = make_inputs("image", torch.float32, triton_device)
    x = torch.randn(8, 4, 16, device=triton_device, requires_grad=True)
    with record_launches() as forward:
        out = scatter_tokens(x, plan, 0.0, 3, backend="triton")
    assert len(forward) == 1 and not forward[0].constexprs["HAS_NOISE"]
    assert launched(lambda: out.backward(torch.ones_like(out))) == ["gather_fwd_kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_without_noise_equals_eager(shape, dtype, triton_device, poisoned_empty):
    B, M, _, K, D, E = SHAPES[shape]
    plan, _ = make_inputs(shape, dtype, triton_device)
    x = torch.randn(B * M, E + K, D).to(triton_device, dtype).requires_grad_()
    out, eager = (scatter_tokens(x, plan, 0.0, 1, backend=name) for name in ("triton", "eager"))
    assert_bitwise_equal(out, eager)
    dout = torch.randn(out.shape).to(out)
    ours, theirs = (torch.autograd.grad(y, x, dout)[0] for y in (out, eager))
    assert_bitwise_equal(ours, theirs)
    assert (ours[:, :E] == 0).all()


def ulps(actual: Tensor, expected: Tensor) -> np.ndarray:
    """Distance in units of the last place of `expected` itself."""
    a, e = actual.cpu().numpy(), expected.cpu().numpy()
    return np.abs(a.astype(np.float64) - e) / np.spacing(np.abs(e))


@pytest.mark.parametrize("seed", [-21, (1 << 62) + 5])
@pytest.mark.parametrize("width", [20, 300])
def test_noise_is_within_4_ulp(width, seed, triton_device, poisoned_empty):
    plan = make_plan(1, 2, 2, 1, triton_device)
    x = torch.randn(2, 2, width, device=triton_device)
    ours, eager = (scatter_tokens(x, plan, 1.0, seed, backend=name) for name in ("triton", "eager"))
    assert_bitwise_equal(ours[~plan.mask], eager[~plan.mask])
    assert ulps(ours[plan.mask], eager[plan.mask]).max() <= 4
    # The deviation is a factor, and the dtype one rounding.
    half = scatter_tokens(x.half(), plan, 0.01, torch.tensor(seed, device=triton_device), backend="triton")
    assert_bitwise_equal(half[plan.mask], (ours[plan.mask] * 0.01).half())


def test_noise_depends_on_seed_and_place_only(triton_device):
    few, all_masked = make_plan(1, 1, 3, 2, triton_device), make_plan(2, 1, 3, 0, triton_device)
    zeros = torch.zeros(2, 3, 12, device=triton_device)
    a = scatter_tokens(zeros[:1, :2], few, 0.5, 21, backend="triton")[few.mask]
    b = scatter_tokens(zeros, all_masked, 0.5, 21, backend="triton")
    assert_bitwise_equal(a, b[:1][few.mask])
    assert b.unique().numel() == b.numel()
    for seed in (22, 21 + (1 << 32)):
        other = scatter_tokens(zeros[:1, :2], few, 0.5, seed, backend="triton")[few.mask]
        assert (other != a).all()


def test_padded_batch(triton_device):
    """Padding is masked as any other token."""
    mask = torch.tensor(
        [[0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1]]
    ).bool()
    plan = MaskPlan.from_mask(mask, 2, torch.full((4,), 4, dtype=torch.int32)).to(triton_device)
    x = torch.randn(2, 6, 8, device=triton_device)
    x[:, 4:] = math.nan
    x[:, 0] = -0.0  # copied bit by bit
    x.requires_grad_()
    kept = gather_tokens(x, plan, backend="triton")
    out = scatter_tokens(kept, plan, 0.0, 0, backend="triton")
    assert_bitwise_equal(out, x.repeat_interleave(2, 0).masked_fill(plan.mask[..., None], 0.0))
    out.sum().backward()
    assert (x.grad[:, 4:] == 0).all()


def test_repeats_are_bitwise(triton_device, poisoned_empty):
    plan, tensors = make_inputs("primes, two extra tokens", torch.float16, triton_device)
    dout = torch.randn(15, 5, 7).to(tensors["x"])
    (first, grads), (second, again) = (gradients(plan, tensors, "triton", dout) for _ in range(2))
    assert_bitwise_equal(first, second)
    for name in NAMES:
        assert_bitwise_equal(grads[name], again[name])


def test_rows_of_any_stride_are_read_in_place(triton_device):
    plan, tensors = make_inputs("primes, two extra tokens", torch.float32, triton_device)
    expected = gather_tokens(plan=plan, **tensors, backend="triton")
    swapped = {
        "x": tensors["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "extra": torch.stack([tensors["extra"]] * 2, 1)[:, 1],
        "positions": torch.cat([tensors["positions"]] * 2, 1)[:, 7:],
        "per_mask": tensors["per_mask"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    with record_launches() as launches:
        assert_bitwise_equal(gather_tokens(plan=plan, **swapped, backend="triton"), expected)
    read = [launches[0].args[i].data_ptr() for i in (0, 2, 3, 4)]
    assert read == [tensor.data_ptr() for tensor in swapped.values()]
    # Other layouts are copied.
    for name, tensor in tensors.items():
        spread = torch.stack([tensor, tensor], -1)[..., 0]
        assert_bitwise_equal(
            gather_tokens(plan=plan, **{**tensors, name: spread}, backend="triton"), expected
        )
    kept = torch.randn(15, 5, 14, device=triton_device)
    for view in (kept[..., ::2], kept[:, :, :7], kept.transpose(0, 1).contiguous().transpose(0, 1)[..., 7:]):
        ours = scatter_tokens(view, plan, 0.0, 0, backend="triton")
        assert_bitwise_equal(ours, scatter_tokens(view.contiguous(), plan, 0.0, 0, backend="eager"))


def test_expanded_gradient_and_strided_plan(triton_device):
    """sum().backward() sends a gradient of stride 0; a plan's tensors may be transposed."""
    whole = make_plan(2, 2, 6, 3, triton_device)
    strided = MaskPlan(whole.mask, whole.ids_keep.T.contiguous().T, whole.slot.T.contiguous().T, 2)
    x = torch.randn(2, 6, 8, device=triton_device, requires_grad=True)
    counts = (~whole.mask).view(2, 2, 6).sum(1)[..., None]
    for plan in (whole, strided):
        out = gather_tokens(x, plan, backend="triton")
        (dx,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert torch.equal(dx, counts.expand(2, 6, 8).float())
        (dx,) = torch.autograd.grad(scatter_tokens(out, plan, 0.0, 0, backend="triton").sum(), x)
        assert torch.equal(dx, counts.expand(2, 6, 8).float())


def test_more_rows_than_one_axis_of_the_grid(triton_device, monkeypatch):
    monkeypatch.setattr(gather_fwd, "MOST_PROGRAMS", 4)
    plan, tensors = make_inputs("more samples than a partial sum takes", torch.float32, triton_device)
    dout = output_gradient(plan, tensors)
    with record_launches() as launches:
        out, grads = gradients(plan, {"x": tensors["x"]}, "triton", dout[:, 1:])
        decoded = scatter_tokens(out, plan, 0.0, 0, backend="triton")
    assert [launch.grid[1:] for launch in launches] == [(4, 2)] * 3
    expected, theirs = gradients(plan, {"x": tensors["x"]}, "eager", dout[:, 1:])
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(grads["x"], theirs["x"])
    assert_bitwise_equal(decoded, scatter_tokens(out, plan, 0.0, 0, backend="eager"))


# What the registered ops share: 2 samples, 3 clones, 4 tokens, 3 kept, 8 columns, 1 extra token.
SMALL = {"x": (2, 4, 8), "extra": (1, 8), "positions": (4, 8), "per_mask": (6, 4, 8)}


def test_opcheck(triton_device):
    plan = make_plan(2, 3, 4, 3, triton_device)
    x, *rest = (torch.randn(size, device=triton_device) for size in SMALL.values())
    dout = torch.randn(6, 4, 8, device=triton_device)
    permuted = x.transpose(0, 1).contiguous().transpose(0, 1)
    ops = torch.ops.d2vkern
    calls = [
        (ops.gather_fwd, (permuted, plan.ids_keep, 3, *rest)),
        (ops.gather_fwd, (x, plan.ids_keep, 3, None, None, None)),
        (ops.gather_bwd, (dout, plan.slot, 3, 1, [True] * 4)),
        (ops.gather_bwd, (dout, plan.slot, 3, 1, [False, True, False, False])),
        (ops.scatter_fwd, (dout, plan.slot, 1, 0.0, torch.tensor(3, device=triton_device), [0, 0])),
        (ops.scatter_fwd, (dout, plan.slot, 1, 0.0, None, [3, 0])),
        (ops.scatter_bwd, (rest[2], plan.ids_keep, 1)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args)


def both_ways(mask, keep, slot, *values):
    plan = MaskPlan(mask, keep, slot, 3)
    kept = gather_tokens(values[0], plan, *values[1:], backend="triton")
    return kept, scatter_tokens(kept, plan, 0.1, 3, backend="triton")


def stepped(run, plan: MaskPlan, values: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of `both_ways`, called as `run(...)`."""
    kept, out = run(plan.mask, plan.ids_keep, plan.slot, *values)
    return [kept, out, *torch.autograd.grad(out.square().sum() + kept.sum(), values)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic, triton_device):
    compiled = torch.compile(both_ways, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (4, 5) if dynamic else (4,):
        plan = make_plan(2, 3, tokens, tokens - 1, triton_device)
        sizes = ((2, tokens, 8), (1, 8), (tokens, 8), (6, tokens, 8))
        values = [torch.randn(size, device=triton_device, requires_grad=True) for size in sizes]
        with backend_spy() as calls:
            traced = stepped(compiled, plan, values)
        assert set(calls) == {("gather", "triton")}
        for ours, plain in zip(traced, stepped(both_ways, plan, values), strict=True):
            assert_bitwise_equal(ours, plain)


def test_checkpoint_and_autocast(triton_device):
    plan = make_plan(2, 3, 4, 3, triton_device)
    values = [torch.randn(size, device=triton_device, requires_grad=True) for size in SMALL.values()]
    plain = stepped(both_ways, plan, values)
    again = stepped(lambda *args: checkpoint(both_ways, *args, use_reentrant=False), plan, values)
    with torch.autocast(triton_device.type, torch.bfloat16):
        mixed = stepped(both_ways, plan, values)
    for expected, *others in zip(plain, again, mixed, strict=True):
        for other in others:
            assert_bitwise_equal(other, expected)


def test_ranges_count_the_same_work_as_eager(triton_device):
    plan, tensors = make_inputs("image", torch.float32, triton_device)
    tallies = {}
    for backend in ("eager", "triton"):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        with _nvtx.force_ranges(True), _nvtx.tally_costs() as tallies[backend]:
            kept = gather_tokens(plan=plan, **leaves, backend=backend)
            scatter_tokens(kept, plan, 0.0, 0, backend=backend).sum().backward()
    ours, eager = tallies["triton"], tallies["eager"]
    assert set(ours) == {f"{op}/{way}/triton" for op in ("gather", "scatter") for way in ("fwd", "bwd")}
    assert {name.replace("triton", "eager"): tally for name, tally in ours.items()} == eager


def test_meta_tensors_launch_without_values(triton_device):
    """As ahead-of-time compilation calls the ops; an int seed takes no launch of its own."""
    plan, tensors = make_inputs("image", torch.float32, torch.device("meta"))
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    with record_launches() as launches:
        kept = kernels.gather_tokens(leaves[0], plan, *leaves[1:])
        out = kernels.scatter_tokens(kept, plan, 0.1, 5)
        grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert [launch.kernel.__name__ for launch in launches] == [
        "gather_fwd_kernel",
        "scatter_fwd_kernel",
        "gather_fwd_kernel",
        "gather_bwd_kernel_rows",
        "column_sums_kernel",
    ]
    assert launches[1].constexprs["HAS_NOISE"]


def test_requests_that_cannot_be_met(triton_device):
    plan, tensors = make_inputs("image", torch.float64, triton_device)
    with pytest.raises(ValueError, match="fp64 tensors run on eager only"):
        gather_tokens(tensors["x"], plan, backend="triton")
    if triton_device.type == "cpu":
        with pytest.raises(ValueError, match="interpreter is wrong in bf16"):
            scatter_tokens(torch.zeros(8, 5, 16, dtype=torch.bfloat16), plan, 0.1, 0, backend="triton")


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    device = torch.device("cuda")
    rows, width = 1 << 12, 1 << 14
    plan = random_mask(torch.arange(rows // 8, device=device), 8, 40, prob=0.5)
    assert rows * 40 * width > 2**31
    x = torch.randn(rows, 20, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = scatter_tokens(x, plan, 0.0, 0, backend="triton")
    last = plan.ids_keep[-1].long()
    assert torch.equal(out[-1, last], x[-1]) and not out[-1][plan.mask[-1]].any()
    (dx,) = torch.autograd.grad(out, x, out)
    assert torch.equal(dx, x)
    del out
    back = gather_tokens(dx.view(rows // 8, 160, width)[:, :40], plan, backend="triton")
    assert torch.equal(back[-1], dx.view(rows // 8, 160, width)[-1, last])


@pytest.mark.gpu
def test_cuda_graph_draws_anew_from_a_seed_tensor():
    device = torch.device("cuda")
    plan, tensors = make_inputs("image", torch.float32, device)
    x = tensors["x"].requires_grad_()
    seed = torch.tensor(1, device=device)

    def step():
        kept = gather_tokens(x, plan, tensors["extra"], backend="triton")
        out = scatter_tokens(kept, plan, 0.1, seed, backend="triton")
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dx = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for replayed, expected in zip((out, dx), step(), strict=True):
            assert_bitwise_equal(replayed, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 1280])
def test_widths_of_the_presets(width):
    device = torch.device("cuda")
    plan = random_mask(torch.arange(4, device=device), 16, 196, prob=0.8)
    sizes = ((4, 196, width), (1, width), (196, width), (64, 196, width))
    tensors = dict(zip(NAMES, (torch.randn(s, device=device).bfloat16() for s in sizes), strict=True))
    dout = torch.randn(64, 40, width, device=device).bfloat16()
    out, grads = gradients(plan, tensors, "triton", dout)
    expected, theirs = gradients(plan, tensors, "eager", dout)
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(grads["x"], theirs["x"])
    assert_bitwise_equal(grads["per_mask"], theirs["per_mask"])
    ours, eager = (scatter_tokens(out.float(), plan, 1.0, 5, backend=name) for name in ("triton", "eager"))
    assert_bitwise_equal(ours[~plan.mask], eager[~plan.mask])
    assert ulps(ours[plan.mask], eager[plan.mask]).max() <= 4
