"""Compiled gather and scatter against eager: the same bits, but for the normals and sums over all rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2vkern import MaskPlan, gather_tokens, random_mask, scatter_tokens
from d2vkern._backend import BackendError
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.reference.philox import element_normals
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

from .native_common import DTYPES, LEVELS, cpu_level, threads

NAMES = ("x", "extra", "positions", "per_mask")
# name: samples B, clones M, tokens T, kept K, width D, extra tokens E
SHAPES = {
    "image": (2, 4, 10, 3, 16, 1),
    "audio, no extra tokens": (1, 3, 9, 5, 64, 0),
    "primes, two extra tokens": (3, 5, 7, 3, 7, 2),
    "wider than a block": (1, 2, 5, 3, 1030, 1),
    "one token kept": (2, 2, 5, 1, 12, 1),
    "nothing masked": (2, 2, 5, 5, 12, 1),
    "everything masked": (2, 2, 5, 0, 12, 1),
    "nothing to write": (2, 2, 5, 0, 12, 0),
    "a single token": (1, 1, 1, 1, 4, 0),
    "no samples": (0, 3, 5, 2, 8, 1),
    "no width": (2, 2, 5, 2, 0, 1),
}
ops = torch.ops.d2vkern_native


def make_plan(B: int, M: int, T: int, K: int) -> MaskPlan:
    mask = torch.ones(B * M, T, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(T)[:K]] = False
    if B == 0:  # from_mask would find nothing kept
        slot, ids_keep = (torch.empty(0, size, dtype=torch.int32) for size in (T, K))
        return MaskPlan(mask, ids_keep, slot, M)
    return MaskPlan.from_mask(mask, M)


def make_inputs(shape: str, dtype: torch.dtype) -> tuple[MaskPlan, dict[str, Tensor]]:
    B, M, T, K, D, E = SHAPES[shape]
    sizes = {"x": (B, T, D), "extra": (E, D), "positions": (T, D), "per_mask": (B * M, T, D)}
    return make_plan(B, M, T, K), {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


def gradients(plan: MaskPlan, tensors: dict[str, Tensor], backend: str, dout: Tensor) -> dict[str, Tensor]:
    """The gradient of each tensor, in the dtype of dout."""
    leaves = {name: tensor.detach().to(dout.dtype).requires_grad_() for name, tensor in tensors.items()}
    out = gather_tokens(plan=plan, **leaves, backend=backend)
    return dict(zip(leaves, torch.autograd.grad(out, leaves.values(), dout), strict=True))


def output_gradient(plan: MaskPlan, tensors: dict[str, Tensor]) -> Tensor:
    """Random eighths, small enough that fp32 sums of them are exact in any order."""
    size = (plan.mask.shape[0], tensors["extra"].shape[0] + plan.kept, tensors["x"].shape[2])
    return (torch.randint(-16, 17, size) / 8).to(tensors["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_equals_eager(shape: str, dtype: torch.dtype) -> None:
    plan, tensors = make_inputs(shape, dtype)
    for names in (("x",), ("x", "positions"), ("x", "per_mask"), ("x", "extra", "per_mask"), NAMES):
        given = {name: tensors[name] for name in names}
        expected = gather_tokens(plan=plan, **given, backend="eager")
        for level in LEVELS:
            with backend_spy() as calls, cpu_level(level):
                out = gather_tokens(plan=plan, **given, backend="native")
            assert calls == [("gather", "native")]
            assert out.is_contiguous()
            assert_bitwise_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_gradients_equal_eager(shape: str, dtype: torch.dtype) -> None:
    plan, tensors = make_inputs(shape, dtype)
    dout = output_gradient(plan, tensors)
    expected = gradients(plan, tensors, "eager", dout)
    for level in LEVELS:
        with cpu_level(level):
            ours = gradients(plan, tensors, "native", dout)
        for name in NAMES:
            assert ours[name].is_contiguous()
            assert_bitwise_equal(ours[name], expected[name])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_sums_of_every_low_number(dtype: torch.dtype, level: int) -> None:
    """Infinities and subnormals too; of a NaN only that it is one."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 1024)
    plan = MaskPlan.from_mask(torch.zeros(1, 64, dtype=torch.bool), 1)
    for added in (x[0].flip(0), x[0].roll(7), torch.full_like(x[0], 2.0**-20)):
        with cpu_level(level):
            ours = gather_tokens(x, plan, None, added, added[None], backend="native")
        theirs = gather_tokens(x, plan, None, added, added[None], backend="eager")
        assert_bitwise_equal(ours.isnan(), theirs.isnan())
        assert_bitwise_equal(ours.nan_to_num(nan=0.0), theirs.nan_to_num(nan=0.0))


@pytest.mark.parametrize("names", [("x",), ("extra",), ("positions",), ("per_mask",), ("x", "per_mask")])
def test_only_what_is_needed(names: tuple[str, ...]) -> None:
    plan, tensors = make_inputs("primes, two extra tokens", torch.float32)
    dout = output_gradient(plan, tensors)
    expected = gradients(plan, tensors, "eager", dout)
    leaves = {name: tensor.requires_grad_(name in names) for name, tensor in tensors.items()}
    gather_tokens(plan=plan, **leaves, backend="native").backward(dout)
    for name, leaf in leaves.items():
        if name in names:
            assert_bitwise_equal(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


def test_rounding_of_gradients() -> None:
    """Those of x and per_mask have eager's bits; those that sum over all rows are summed in fp64."""
    plan = make_plan(8, 4, 4, 2)
    sizes = {"x": (8, 4, 16), "extra": (1, 16), "positions": (4, 16), "per_mask": (32, 4, 16)}
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    dout = torch.randn(32, 3, 16)
    ours, eager, exact = (
        gradients(plan, tensors, backend, grad)
        for backend, grad in (("native", dout), ("eager", dout), ("eager", dout.double()))
    )
    for name in ("x", "per_mask"):
        assert_bitwise_equal(ours[name], eager[name])
    for name in ("extra", "positions"):
        assert_no_worse_than_eager(ours[name], eager[name], exact[name])
    assert_bitwise_equal(ours["extra"], exact["extra"].float())


def test_gradient_of_x_sums_in_clone_order() -> None:
    plan = MaskPlan.from_mask(torch.zeros(64, 2, dtype=torch.bool), clones=64)
    dout = torch.randn(64, 2, 4)
    x = torch.zeros(1, 2, 4, requires_grad=True)
    in_order = torch.zeros(2, 4)
    for m in range(64):
        in_order += dout[m]
    (dx,) = torch.autograd.grad(gather_tokens(x, plan, backend="native"), x, dout)
    assert_bitwise_equal(dx[0], in_order)
    # fp16 sums would lose each 1 beside 4096.
    half = torch.ones(64, 2, 4, dtype=torch.float16)
    half[0] = 4096.0
    x, positions = (torch.zeros(s, dtype=torch.float16, requires_grad=True) for s in ((1, 2, 4), (2, 4)))
    out = gather_tokens(x, plan, None, positions, backend="native")
    for grad in torch.autograd.grad(out, (x, positions), half):
        assert (grad == torch.tensor(4096.0 + 63.0).half().item()).all()


def test_strides() -> None:
    """Of any strides but a contiguous last dimension nothing is copied, the rest is; bits are the same."""
    plan, tensors = make_inputs("image", torch.float32)
    dout = output_gradient(plan, tensors)
    expected = gather_tokens(plan=plan, **tensors, backend="eager")
    grads = gradients(plan, tensors, "eager", dout)
    for spread in (
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, -2).contiguous().transpose(0, -2),
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: t[:1].expand(t.shape) if t.dim() == 2 else t,
    ):
        given = {name: spread(tensor) for name, tensor in tensors.items()}
        if spread(tensors["positions"]).stride(0):
            assert_bitwise_equal(gather_tokens(plan=plan, **given, backend="native"), expected)
            for name, grad in gradients(plan, given, "native", spread(dout)).items():
                assert_bitwise_equal(grad, grads[name])
        else:
            ours, theirs = (gather_tokens(plan=plan, **given, backend=b) for b in ("native", "eager"))
            assert_bitwise_equal(ours, theirs)
    ids = torch.empty(plan.kept, plan.mask.shape[0], dtype=torch.int32).t().copy_(plan.ids_keep)
    slot = torch.empty(plan.tokens, plan.mask.shape[0], dtype=torch.int32).t().copy_(plan.slot)
    turned = MaskPlan(plan.mask, ids, slot, plan.clones)
    assert_bitwise_equal(gather_tokens(plan=turned, **tensors, backend="native"), expected)
    assert_bitwise_equal(gradients(turned, tensors, "native", dout)["x"], grads["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_without_noise_equals_eager(shape: str, dtype: torch.dtype) -> None:
    plan, _ = make_inputs(shape, dtype)
    B, M, T, K, D, E = SHAPES[shape]
    x = torch.randn(B * M, E + K, D).to(dtype).requires_grad_()
    dout = torch.randn(B * M, T, D).to(dtype)
    results = []
    for backend in ("native", "eager"):
        with backend_spy() as calls:
            out = scatter_tokens(x, plan, 0.0, 3, backend=backend)
        assert calls == [("gather", backend)]
        results.append((out.detach(), *torch.autograd.grad(out, x, dout)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.is_contiguous()
        assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "shape", ["image", "primes, two extra tokens", "wider than a block", "everything masked"]
)
def test_noise_is_eagers_within_four_ulp(shape: str, level: int) -> None:
    plan, _ = make_inputs(shape, torch.float32)
    B, M, T, K, D, E = SHAPES[shape]
    x = torch.randn(B * M, E + K, D)
    with cpu_level(level):
        ours = scatter_tokens(x, plan, 1.0, 2**63 - 9, backend="native")
    theirs = scatter_tokens(x, plan, 1.0, 2**63 - 9, backend="eager")
    assert_bitwise_equal(ours[~plan.mask], theirs[~plan.mask])
    drawn, expected = ours[plan.mask], theirs[plan.mask]
    assert expected.abs().max() > 2
    # Both radii and angles are the same fp32 numbers, so small normals have small errors too.
    assert ((drawn.view(torch.int32) - expected.view(torch.int32)).abs() <= 4).all()


def test_a_million_normals_within_four_ulp() -> None:
    rows, tokens, width = 8, 16, 8192
    plan = make_plan(rows, 1, tokens, 0)
    ours = scatter_tokens(torch.zeros(rows, 0, width), plan, 1.0, 5, backend="native").view(torch.int32)
    n, t = (
        part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(tokens), indexing="ij")
    )
    theirs = element_normals(n, t, width, seed=5).view(torch.int32)
    worst = (ours.view(-1, width) - theirs).abs().max().item()
    assert 0 < worst <= 4


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_noise_is_drawn_in_fp32_and_rounded(dtype: torch.dtype) -> None:
    plan = make_plan(3, 2, 9, 4)
    wide = scatter_tokens(torch.zeros(6, 4, 33), plan, 0.37, 11, backend="native")
    low = scatter_tokens(torch.zeros(6, 4, 33, dtype=dtype), plan, 0.37, 11, backend="native")
    assert_bitwise_equal(low, wide.to(dtype))


def test_noise_is_a_function_of_seed_and_place() -> None:
    plan = make_plan(2, 2, 6, 2)
    x = torch.zeros(4, 2, 8)
    first = scatter_tokens(x, plan, 1.0, 5, backend="native")
    assert_bitwise_equal(first, scatter_tokens(x, plan, 1.0, torch.tensor(5), backend="native"))
    assert not torch.equal(first, scatter_tokens(x, plan, 1.0, 5 + 2**32, backend="native"))
    wider = scatter_tokens(torch.zeros(4, 2, 19), plan, 1.0, 5, backend="native")
    assert_bitwise_equal(wider[..., :8].contiguous(), first)


def test_threads_change_no_bit() -> None:
    """Sizes that take two threads in every pass."""
    plan = random_mask(torch.arange(4), 4, 64, prob=0.5)
    tensors = {"x": torch.randn(4, 64, 768), "extra": torch.randn(1, 768), "positions": torch.randn(64, 768)}
    tensors["per_mask"] = torch.randn(16, 64, 768)
    dout = torch.randn(16, 33, 768)
    results = []
    for count in (1, 2):
        with threads(count):
            out = gather_tokens(plan=plan, **tensors, backend="native")
            grads = gradients(plan, tensors, "native", dout)
            noisy = scatter_tokens(dout, plan, 0.1, 3, backend="native")
        results.append([out, noisy, *grads.values()])
    for one, two in zip(*results, strict=True):
        assert_bitwise_equal(one, two)


@pytest.mark.parametrize("level", LEVELS)
def test_outputs_larger_than_the_caches(level: int) -> None:
    """These are written past them; also rows that do not begin at a multiple of 16 bytes."""
    for width in (2048, 2047):
        plan = random_mask(torch.arange(4), 33, 64, prob=0.5)
        x = torch.randn(4, 64, width)
        with cpu_level(level):
            out = gather_tokens(x, plan, backend="native")
        assert out.nbytes > 32 << 20
        assert_bitwise_equal(out, gather_tokens(x, plan, backend="eager"))
    back = scatter_tokens(out, plan, 0.0, 0, backend="native")
    assert_bitwise_equal(back, scatter_tokens(out, plan, 0.0, 0, backend="eager"))


def test_refusals() -> None:
    plan = make_plan(2, 2, 5, 2)
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        gather_tokens(torch.zeros(2, 5, 4, dtype=torch.float64), plan, backend="native")
    ids, slot, x, dout = plan.ids_keep, plan.slot, torch.zeros(2, 5, 4), torch.zeros(4, 2, 4)
    all_four = [True] * 4
    for function, arguments, words in (
        (
            ops.gather_fwd,
            (x[0], ids, 2, None, None, None),
            r"x must have shape \(any, any, any\), got \(5, 4\)",
        ),
        (ops.gather_fwd, (x, ids.long(), 2, None, None, None), "ids_keep must have dtype Int, got Long"),
        (ops.gather_fwd, (x, ids, 3, None, None, None), "ids_keep must have 2 . clones = 3 rows, got 4"),
        (ops.gather_fwd, (x, ids + 4, 2, None, None, None), "ids_keep must be >= 0 and < 5, got one outside"),
        (ops.gather_fwd, (x, ids - 5, 2, None, None, None), "ids_keep must be >= 0 and < 5, got one outside"),
        (
            ops.gather_fwd,
            (x, ids, 2, x[0, :, :3], None, None),
            r"extra must have shape \(any, 4\), got \(5, 3\)",
        ),
        (ops.gather_fwd, (x, ids, 2, None, x[0].half(), None), "positions must have dtype Float, got Half"),
        (ops.gather_fwd, (x.long(), ids, 2, None, None, None), "x must be fp32, fp16 or bf16, got Long"),
        (ops.gather_bwd, (dout, slot[:3], 2, 0, all_four), "dout must have 3 rows like slot"),
        (
            ops.gather_bwd,
            (dout, slot, 2, 3, all_four),
            "extras must be >= 0 and <= 2 and needs four, got 3 and 4",
        ),
        (ops.gather_bwd, (dout, slot, 2, 0, [True]), "needs four, got 0 and 1"),
        (ops.gather_bwd, (dout, slot + 2, 2, 0, all_four), "slot must be < 2, got one outside"),
        (ops.scatter_fwd, (dout, slot + 2, 0, 0.0, None, [0, 0]), "slot must be < 2, got one outside"),
        (ops.scatter_fwd, (dout, slot, 0, 0.1, torch.tensor(1.0), [0, 0]), "seed must have dtype Long"),
        (ops.scatter_fwd, (dout[:1], slot, 0, 0.1, None, [0, 0]), "x must have 4 rows like slot, got 1"),
        (ops.scatter_bwd, (dout, ids[:1], 0), "ids_keep must have 4 rows like dout"),
        (ops.scatter_bwd, (dout, ids + 1, 0), "ids_keep must be >= 0 and < 2, got one outside"),
    ):
        with pytest.raises(ValueError, match=words):
            function(*arguments)


def test_ranges_and_work() -> None:
    plan, tensors = make_inputs("image", torch.float32)
    dout = output_gradient(plan, tensors)
    tallies = {}
    for backend in ("native", "eager"):
        with force_ranges(True), tally_costs() as found:
            gradients(plan, tensors, backend, dout)
            x = torch.zeros(8, 4, 16, requires_grad=True)
            scatter_tokens(x, plan, 0.1, 1, backend=backend).sum().backward()
        tallies[backend] = found
    assert len(tallies["native"]) == 4
    assert {name.replace("native", "eager"): tally for name, tally in tallies["native"].items()} == tallies[
        "eager"
    ]


def test_opcheck() -> None:
    plan, tensors = make_inputs("primes, two extra tokens", torch.float16)
    x, extra, positions, per_mask = tensors.values()
    dout, slot = output_gradient(plan, tensors), plan.slot
    check = torch.library.opcheck
    check(ops.gather_fwd.default, (x, plan.ids_keep, 5, extra, positions, per_mask))
    check(
        ops.gather_fwd.default,
        (x.transpose(1, 2).contiguous().transpose(1, 2), plan.ids_keep, 5, None, None, None),
    )
    check(ops.gather_bwd.default, (dout, slot, 5, 2, [True, False, True, False]))
    check(ops.scatter_fwd.default, (dout, slot, 2, 0.5, torch.tensor(3), [0, 0]))
    check(ops.scatter_bwd.default, (torch.randn(15, 7, 7), plan.ids_keep, 2))


def test_fullgraph_serves_several_sizes() -> None:
    def both(x: Tensor, extra: Tensor, plan: MaskPlan) -> Tensor:
        kept = gather_tokens(x, plan, extra, backend="native")
        return scatter_tokens(kept, plan, 0.1, 7, backend="native")

    graphs = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=count, dynamic=True)
    for samples in (3, 5):
        plan, extra = make_plan(samples, 4, 13, 6), torch.randn(1, 8, requires_grad=True)
        results = []
        for run in (compiled, both):
            x = torch.linspace(-1, 1, samples * 13 * 8).view(samples, 13, 8).requires_grad_()
            out = run(x, extra, plan)
            results.append([out.detach(), *torch.autograd.grad(out, (x, extra), torch.cos(out.detach()))])
        for actual, expected in zip(*results, strict=True):
            assert_bitwise_equal(actual, expected)
    assert len(graphs) == 1
