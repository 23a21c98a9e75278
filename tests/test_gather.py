"""gather_tokens and scatter_tokens against the repeat-then-pick they replace; gradients, memory, errors."""

from collections.abc import Iterator

import pytest
import torch

from d2vkern import use_backend
from d2vkern.ops.gather import gather_tokens, scatter_tokens
from d2vkern.ops.masks import MaskPlan, random_mask
from d2vkern.reference import gather as reference
from d2vkern.testing import assert_bitwise_equal, peak_memory


@pytest.fixture(autouse=True)
def on_eager() -> Iterator[None]:
    """Not the compiled extension, which auto prefers where it is built."""
    with use_backend("eager"):
        yield


# name: B, M, T, D, E, prob
SHAPES = {
    "image": (3, 4, 36, 8, 1, 0.8),
    "audio": (2, 3, 17, 12, 0, 0.5),
    "primes, two extra": (5, 2, 13, 7, 2, 0.4),
    "small": (2, 3, 5, 2, 2, 0.5),
    "one clone": (2, 1, 6, 4, 0, 0.5),
    "one sample, one kept": (1, 3, 2, 4, 1, 0.5),
}


def make_plan(B, M, T, prob, seed=0):
    return random_mask(torch.arange(B), M, T, prob=prob, seed=seed)


def naive_gather(x, plan, extra=None, positions=None, per_mask=None):
    """What the original does: repeat everything M times, add, then pick."""
    repeated = x.repeat_interleave(plan.clones, 0)
    if positions is not None:
        repeated = repeated + positions
    if per_mask is not None:
        repeated = repeated + per_mask
    picked = repeated.gather(1, plan.ids_keep.long()[..., None].expand(-1, -1, x.shape[2]))
    if extra is not None:
        picked = torch.cat([extra.expand(len(picked), -1, -1), picked], 1)
    return picked


def inputs(shape, dtype=torch.float64, requires_grad=True):
    B, M, T, D, E, prob = SHAPES[shape]
    plan = make_plan(B, M, T, prob)
    sizes = {"x": (B, T, D), "extra": (E, D), "positions": (T, D), "per_mask": (B * M, T, D)}
    tensors = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    if E == 0:
        del tensors["extra"]
    return plan, {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_forward_is_exact(shape, dtype):
    plan, tensors = inputs(shape, dtype, requires_grad=False)
    x = tensors["x"]
    for names in ((), ("extra",), ("positions",), ("per_mask",), ("extra", "positions", "per_mask")):
        given = {name: tensors[name] for name in names if name in tensors}
        out = gather_tokens(x, plan, **given)
        assert_bitwise_equal(out, naive_gather(x, plan, **given))


@pytest.mark.parametrize("shape", SHAPES)
def test_gather_gradients_match_autograd(shape):
    plan, tensors = inputs(shape)
    expected = naive_gather(plan=plan, **tensors)
    weight = torch.randn_like(expected)
    out = gather_tokens(plan=plan, **tensors)
    for name, tensor in tensors.items():
        want = torch.autograd.grad((expected * weight).sum(), tensor, retain_graph=True)[0]
        got = torch.autograd.grad((out * weight).sum(), tensor, retain_graph=True)[0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)
        assert got.is_contiguous()


@pytest.mark.parametrize("shape", ["small", "one clone", "one sample, one kept"])
def test_gradcheck(shape):
    plan, tensors = inputs(shape)
    names = list(tensors)

    def run(*values):
        return gather_tokens(plan=plan, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))
    B, M, T, D, E, _ = SHAPES[shape]
    x = torch.randn(B * M, E + plan.kept, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter_tokens(x, plan, 0.5, 3), (x,))


def test_gather_gradient_accumulates_in_fp32_in_clone_order():
    plan = MaskPlan.from_mask(torch.zeros(64, 2, dtype=torch.bool), clones=64)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(1, 2, 4, dtype=dtype, requires_grad=True)
        positions = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
        # 256 + 63 * 1: in bf16 each 1 alone would be lost.
        dout = torch.ones(64, 2, 4, dtype=dtype)
        dout[0] = 256.0
        dx, dpositions = torch.autograd.grad(gather_tokens(x, plan, None, positions), (x, positions), dout)
        expected = torch.tensor(256.0 + 63.0).to(dtype)
        assert dx.dtype == dtype and (dx == expected).all() and (dpositions == expected).all()
    x = torch.zeros(1, 2, 4, requires_grad=True)
    dout = torch.randn(64, 2, 4)
    in_order = torch.zeros(2, 4)
    for m in range(64):
        in_order += dout[m]
    (dx,) = torch.autograd.grad(gather_tokens(x, plan), x, dout)
    assert_bitwise_equal(dx[0], in_order)


def test_only_wanted_gradients_are_made():
    plan, tensors = inputs("image")
    for wanted in tensors:
        given = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in tensors.items()}
        gather_tokens(plan=plan, **given).sum().backward()
        assert all((tensor.grad is not None) == (name == wanted) for name, tensor in given.items())


def test_per_mask_gradient_is_zero_at_masked_places():
    plan, tensors = inputs("audio")
    gather_tokens(plan=plan, **tensors).backward(torch.ones(6, plan.kept, 12, dtype=torch.float64))
    grad = tensors["per_mask"].grad
    assert (grad[plan.mask] == 0).all() and (grad[~plan.mask] == 1).all()


def test_repeats_are_bitwise_and_poison_does_not_show(poisoned_empty):
    plan, tensors = inputs("image", torch.float32)
    runs = []
    for _ in range(2):
        gathered = gather_tokens(plan=plan, **tensors)
        out = scatter_tokens(gathered, plan, 0.1, 7)
        runs.append([gathered, out, *torch.autograd.grad(out.square().sum(), tuple(tensors.values()))])
    for first, second in zip(*runs, strict=True):
        assert_bitwise_equal(first, second)
        assert first.isfinite().all()


def test_non_contiguous_inputs():
    plan, tensors = inputs("image", torch.float32, requires_grad=False)
    x, per_mask = tensors["x"], tensors["per_mask"]
    expected = gather_tokens(x, plan, per_mask=per_mask)
    assert_bitwise_equal(
        gather_tokens(x.transpose(0, 1).contiguous().transpose(0, 1), plan, per_mask=per_mask), expected
    )
    strided = torch.stack([x, x], -1)[..., 0]
    strided_mask = torch.stack([per_mask, per_mask], 2)[:, :, 0]
    assert_bitwise_equal(gather_tokens(strided, plan, per_mask=strided_mask), expected)
    kept = torch.randn(12, plan.kept + 1, 16)
    assert_bitwise_equal(
        scatter_tokens(kept[..., ::2], plan, 0.0, 0),
        scatter_tokens(kept[..., ::2].contiguous(), plan, 0.0, 0),
    )
    # An expanded gradient, as sum().backward() makes it.
    leaf = x.clone().requires_grad_()
    gather_tokens(leaf, plan).sum().backward()
    counts = (~plan.mask).view(3, 4, 36).sum(1)
    assert torch.equal(leaf.grad, counts[..., None].expand(3, 36, 8).float())


@pytest.mark.parametrize("extras", [0, 2])
@pytest.mark.parametrize(
    "mask",
    [torch.zeros(4, 5), torch.ones(4, 5), torch.zeros(0, 5), torch.zeros(4, 1)],
    ids=["all kept", "all masked", "no samples", "one token"],
)
def test_edge_plans(mask, extras):
    plan = MaskPlan.from_mask(mask.bool(), clones=2)
    N, T = mask.shape
    x = torch.randn(N // 2, T, 3, requires_grad=True)
    extra = torch.randn(extras, 3, requires_grad=True)
    out = gather_tokens(x, plan, extra, torch.zeros(T, 3), torch.zeros(N, T, 3))
    assert_bitwise_equal(out, naive_gather(x, plan, extra))
    decoded = scatter_tokens(out, plan, 0.3, 1)
    assert decoded.shape == (N, T, 3)
    assert torch.equal(decoded[~plan.mask], x.repeat_interleave(2, 0)[~plan.mask])
    decoded.sum().backward()
    assert torch.equal(x.grad, (~plan.mask).view(N // 2, 2, T).sum(1)[..., None].expand_as(x).float())
    assert (extra.grad == 0).all()


def test_zero_width():
    plan = make_plan(2, 2, 6, 0.5)
    out = gather_tokens(torch.zeros(2, 6, 0), plan)
    assert out.shape == (4, 3, 0) and scatter_tokens(out, plan, 0.1, 0).shape == (4, 6, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_puts_kept_tokens_back(shape):
    plan, tensors = inputs(shape, torch.float32, requires_grad=False)
    extra = tensors.get("extra")
    kept = gather_tokens(tensors["x"], plan, extra, per_mask=tensors["per_mask"])
    out = scatter_tokens(kept, plan, 0.0, 0)
    full = tensors["x"].repeat_interleave(plan.clones, 0) + tensors["per_mask"]
    assert torch.equal(out, full.masked_fill(plan.mask[..., None], 0.0))


def test_scatter_backward_is_a_gather():
    plan, tensors = inputs("primes, two extra")
    x = torch.randn(10, 2 + plan.kept, 7, requires_grad=True)
    dout = torch.randn(10, 13, 7)
    (dx,) = torch.autograd.grad(scatter_tokens(x, plan, 1.0, 0), x, dout)
    assert (dx[:, :2] == 0).all()
    for n in range(10):
        assert torch.equal(dx[n, 2:], dout[n, plan.ids_keep[n].long()])


def test_no_noise_draws_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("generator used")

    plan = make_plan(2, 2, 8, 0.5)
    x = torch.randn(4, 4, 6)
    monkeypatch.setattr(reference, "element_normals", refuse)
    out = scatter_tokens(x, plan, 0.0, 1)
    assert torch.equal(out[plan.mask], torch.zeros(16, 6))
    with pytest.raises(AssertionError, match="generator used"):
        scatter_tokens(x, plan, 0.1, 1)


def test_noise_depends_on_seed_and_place_only():
    few, many = make_plan(2, 2, 12, 0.5), make_plan(5, 2, 12, 0.75, seed=9)
    a = scatter_tokens(torch.zeros(4, few.kept, 10), few, 0.5, 21)
    b = scatter_tokens(torch.ones(10, 3 + many.kept, 10), many, 0.5, 21)
    both = few.mask & many.mask[:4]
    assert both.any()
    torch.testing.assert_close(a[both], b[:4][both], rtol=0, atol=1e-6)
    for seed in (22, 21 + (1 << 32), -21):
        other = scatter_tokens(torch.zeros(4, few.kept, 10), few, 0.5, seed)
        assert (other[few.mask] != a[few.mask]).all()
    assert_bitwise_equal(scatter_tokens(torch.zeros(4, few.kept, 10), few, 0.5, torch.tensor(21)), a)
    half = scatter_tokens(torch.zeros(4, few.kept, 10, dtype=torch.bfloat16), few, 0.5, 21)
    assert_bitwise_equal(half, a.bfloat16())


@pytest.mark.parametrize("width", [768, 37])
def test_noise_chunks_change_no_bit(monkeypatch, width):
    plan = make_plan(2, 3, 40, 0.7)
    x = torch.zeros(6, plan.kept, width)
    whole = scatter_tokens(x, plan, 1.0, 5)
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(reference, "NOISE_CHUNK", chunk)
        assert_bitwise_equal(scatter_tokens(x, plan, 1.0, 5), whole)


def test_noise_is_gaussian_of_the_wanted_deviation():
    plan = make_plan(8, 4, 64, 0.5)
    noise = scatter_tokens(torch.zeros(32, 32, 128), plan, 0.01, 3)[plan.mask].double()
    count = noise.numel()
    # Mean and variance within 4 standard errors; tails as a normal's.
    assert abs(noise.mean().item()) < 4 * 0.01 / count**0.5
    assert abs(noise.var().item() / 1e-4 - 1) < 4 * (2 / count) ** 0.5
    share = (noise.abs() > 0.02).double().mean().item()
    assert abs(share - 0.0455) < 4 * (0.0455 * 0.9545 / count) ** 0.5


MIB = 1 << 20


@pytest.mark.parametrize("case", ["audio", "image", "text"])
def test_memory_of_gather(case):
    """Forward and backward need the output, the gradients, and one [B, T, D] (fp32 sum or x + positions)."""
    B, M, T, D = 2, 16, 256, 256
    plan = make_plan(B, M, T, 0.75)
    x = torch.randn(B, T, D, requires_grad=True)
    given = {
        "audio": {"per_mask": torch.randn(B * M, T, D, requires_grad=True)},
        "image": {"positions": torch.randn(T, D), "extra": torch.randn(1, D, requires_grad=True)},
        "text": {},
    }[case]
    leaves = [x, *(tensor for tensor in given.values() if tensor.requires_grad)]
    dout = torch.randn(B * M, plan.kept + (case == "image"), D)

    def step():
        return torch.autograd.grad(gather_tokens(x, plan, **given), leaves, dout)

    step()
    output, sample, all_rows = dout.nbytes, x.nbytes, B * M * T * D * 4
    allowed = output + sum(leaf.nbytes for leaf in leaves) + 2 * sample + output // M + MIB // 2
    peak = peak_memory(step)
    assert peak <= allowed, f"{peak / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"
    if case != "audio":  # its gradient of per_mask is itself [N, T, D]
        assert peak < 0.8 * all_rows
    assert peak_memory(lambda: naive_gather(x, plan, **given)) > all_rows


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_memory_of_scatter(noise_std):
    plan = make_plan(2, 16, 256, 0.75)
    x = torch.randn(32, 1 + plan.kept, 256, requires_grad=True)
    dout = torch.randn(32, 256, 256)

    def step():
        return torch.autograd.grad(scatter_tokens(x, plan, noise_std, 0), x, dout)

    step()
    # The chunk of noise: at most 12 words of 8 bytes per counter.
    chunk = 12 * 8 * reference.NOISE_CHUNK * torch.get_num_threads() if noise_std else 0
    assert peak_memory(step) <= dout.nbytes + x.nbytes + x.nbytes // 16 + chunk + MIB


# Dynamo makes an instance of each autograd.Function it traces, which torch itself warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_fullgraph_forward_and_backward():
    plan, tensors = inputs("small", torch.float32)
    names = list(tensors)

    def step(plan, *values):
        kept = gather_tokens(plan=plan, **dict(zip(names, values, strict=True)))
        return kept, scatter_tokens(kept, plan, 0.1, 3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        kept, out = run(plan, *tensors.values())
        results.append([kept, out, *torch.autograd.grad(out.square().sum() + kept.sum(), tensors.values())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)


ERRORS = {
    "x tokens": (
        dict(x=torch.zeros(2, 5, 4)),
        ValueError,
        r"x must have shape \(2, 6, D\) like plan, got \(2, 5, 4\)",
    ),
    "x rank": (dict(x=torch.zeros(2, 6)), ValueError, "gather_tokens: x must have shape"),
    "x dtype": (
        dict(x=torch.zeros(2, 6, 4, dtype=torch.int64)),
        TypeError,
        "gather_tokens: x must have dtype",
    ),
    "extra": (
        dict(extra=torch.zeros(1, 5)),
        ValueError,
        r"extra must have shape \(E, 4\) like x, got \(1, 5\)",
    ),
    "positions": (dict(positions=torch.zeros(7, 4)), ValueError, r"positions must have shape \(6, 4\)"),
    "per_mask": (dict(per_mask=torch.zeros(2, 6, 4)), ValueError, r"per_mask must have shape \(4, 6, 4\)"),
    "mixed dtypes": (
        dict(positions=torch.zeros(6, 4).half()),
        TypeError,
        "positions must have dtype float32 like x",
    ),
    "device": (
        dict(x=torch.zeros(2, 6, 4, device="meta")),
        ValueError,
        "plan must be on meta like x, got cpu",
    ),
    "backend": (dict(backend="nativ"), ValueError, "did you mean .native."),
}


@pytest.mark.parametrize("case", ERRORS)
def test_gather_errors(case):
    changed, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        gather_tokens(**{"x": torch.zeros(2, 6, 4), "plan": make_plan(2, 2, 6, 0.5), **changed})


SCATTER_ERRORS = {
    "rows": (
        dict(x=torch.zeros(3, 3, 4)),
        ValueError,
        r"scatter_tokens: x must have shape \(4, S, D\) like plan",
    ),
    "too few": (dict(x=torch.zeros(4, 2, 4)), ValueError, "x tokens S must be >= 3, got 2"),
    "negative": (dict(noise_std=-0.1), ValueError, "noise_std must be >= 0.0, got -0.1"),
    "nan": (dict(noise_std=float("nan")), ValueError, "noise_std must be >= 0.0, got nan"),
    "seed shape": (dict(seed=torch.zeros(1, dtype=torch.int64)), ValueError, "seed must have shape"),
    "seed dtype": (dict(seed=torch.tensor(0.5)), TypeError, "seed must have dtype int64, got float32"),
    "x dtype": (dict(x=torch.zeros(4, 3, 4, dtype=torch.int32)), TypeError, "x must have dtype"),
}


@pytest.mark.parametrize("case", SCATTER_ERRORS)
def test_scatter_errors(case):
    changed, error, message = SCATTER_ERRORS[case]
    given = {
        "x": torch.zeros(4, 3, 4),
        "plan": make_plan(2, 2, 6, 0.5),
        "noise_std": 0.1,
        "seed": 0,
        **changed,
    }
    with pytest.raises(error, match=message):
        scatter_tokens(**given)
