"""Masked regression loss in Triton: values, gradients and variances against eager and fp64."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from d2vkern._backend import BackendError
from d2vkern.ops.loss import LossOutput, masked_regression_loss
from d2vkern.ops.masks import MaskPlan
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy, peak_memory

pytest.importorskip("triton")

from d2vkern.kernels._launch import record_launches

# samples, clones, tokens, masked tokens, width
SHAPES = {
    "small": (2, 3, 8, 5, 6),
    "primes": (3, 5, 13, 7, 11),
    "one token": (2, 2, 1, 1, 3),
    "one value": (1, 1, 1, 1, 1),
    "one masked token": (2, 3, 40, 1, 5),
    "all but one masked, two tiles of tokens": (1, 2, 37, 36, 5),
    "all masked": (2, 2, 5, 5, 4),
    "more versions than a program takes": (1, 19, 6, 3, 4),
    "chunks of channels, the last nearly empty": (1, 2, 9, 5, 129),
    "longer than 512": (1, 2, 513, 300, 3),
}
both_forms = pytest.mark.parametrize("masked_only", [False, True], ids=["all tokens", "masked tokens"])


def make_plan(samples: int, clones: int, tokens: int, masked: int, device: torch.device) -> MaskPlan:
    order = torch.rand(samples * clones, tokens).argsort(1)
    return MaskPlan.from_mask((order < masked).to(device), clones)


def make_case(
    shape: tuple[int, int, int, int, int],
    masked_only: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, MaskPlan]:
    """Predictions (a leaf), targets and plan. NaN stands wherever nobody may look."""
    samples, clones, tokens, masked, width = shape
    plan = make_plan(samples, clones, tokens, masked, device)
    pred = torch.randn(samples * clones, tokens, width, device=device)
    pred = pred * torch.linspace(0.2, 2, width, device=device) + 1
    target = torch.randn(samples, tokens, width, device=device)
    pred[~plan.mask] = float("nan")
    target[~plan.mask.view(samples, clones, tokens).any(1)] = float("nan")
    if masked_only:
        pred = pred[plan.mask].view(samples * clones, masked, width)
    return pred.to(dtype).requires_grad_(), target, plan


def run(
    pred: Tensor,
    target: Tensor,
    plan: MaskPlan,
    beta: float,
    backend: str,
    factor: float = 1.0,
    scale: float | None = None,
) -> tuple[LossOutput, Tensor]:
    leaf = pred.detach().requires_grad_()
    out = masked_regression_loss(leaf, target, plan, beta, scale, backend=backend)
    (out.loss * factor).backward()
    assert leaf.grad is not None
    return LossOutput(*(value.detach() for value in out)), leaf.grad


def exact(pred: Tensor, target: Tensor, plan: MaskPlan, beta: float) -> tuple[LossOutput, Tensor]:
    return run(pred.detach().double(), target.double(), plan, beta, "eager")


def assert_scalars(ours: LossOutput, reference: LossOutput, rtol: float = 5e-7) -> None:
    """Sums of many values: a few roundings. Eager's error of one number may happen to be zero."""
    assert ours.loss.dtype == ours.pred_var.dtype == ours.target_var.dtype == torch.float32
    assert ours.count.item() == reference.count.item()
    for name in ("loss", "pred_var", "target_var"):
        actual, expected = getattr(ours, name).double(), getattr(reference, name)
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@both_forms
@pytest.mark.parametrize(
    ("name", "beta"), [*((name, 0.0) for name in SHAPES), ("primes", 0.5), ("one masked token", 0.5)]
)
def test_matches_eager(name: str, beta: float, masked_only: bool, triton_device: torch.device) -> None:
    case = make_case(SHAPES[name], masked_only, triton_device)
    with backend_spy() as calls:
        ours, grad = run(*case, beta, "triton")
    assert calls == [("loss", "triton")]
    _, eager_grad = run(*case, beta, "eager")
    reference, exact_grad = exact(*case, beta)
    assert_bitwise_equal(grad, eager_grad)
    assert_no_worse_than_eager(grad, eager_grad, exact_grad)
    assert_scalars(ours, reference)


@both_forms
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_fp16_predictions(beta: float, masked_only: bool, triton_device: torch.device) -> None:
    case = make_case((2, 3, 40, 21, 6), masked_only, triton_device, torch.float16)
    ours, grad = run(*case, beta, "triton", 0.3)
    _, eager_grad = run(*case, beta, "eager", 0.3)
    reference, exact_grad = exact(*case, beta)
    assert grad.dtype == torch.float16
    assert_no_worse_than_eager(grad, eager_grad, exact_grad * 0.3)
    assert_scalars(ours, reference)


@both_forms
@pytest.mark.parametrize("beta", [0.0, 0.05, 4.0])
def test_fp16_gradient_of_a_scaled_loss(beta: float, masked_only: bool, triton_device: torch.device) -> None:
    case = make_case((2, 3, 40, 21, 6), masked_only, triton_device, torch.float16)
    for scale, factor in ((1e-7, 65536.0), (1e-12, 2.0**36)):
        exact_grad = run(case[0].double(), case[1].double(), case[2], beta, "eager", factor, scale)[1]
        grad, eager_grad = (run(*case, beta, name, factor, scale)[1] for name in ("triton", "eager"))
        assert_bitwise_equal(grad, eager_grad)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2.0**-10, atol=2.0**-24)


@pytest.mark.gpu
@both_forms
@pytest.mark.parametrize("shape", [(2, 16, 196, 157, 768), (2, 8, 599, 299, 768), (2, 8, 512, 246, 1024)])
def test_bf16_predictions(
    shape: tuple[int, int, int, int, int], masked_only: bool, triton_device: torch.device
) -> None:
    case = make_case(shape, masked_only, triton_device, torch.bfloat16)
    ours, grad = run(*case, 0.0, "triton", 0.3)
    _, eager_grad = run(*case, 0.0, "eager", 0.3)
    reference, exact_grad = exact(*case, 0.0)
    assert_no_worse_than_eager(grad, eager_grad, exact_grad * 0.3)
    assert_scalars(ours, reference, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_targets(dtype: torch.dtype, triton_device: torch.device) -> None:
    pred, target, plan = make_case(SHAPES["small"], True, triton_device)
    ours, grad = run(pred, target.to(dtype), plan, 0.0, "triton")
    reference, _ = exact(pred, target.to(dtype), plan, 0.0)
    assert_bitwise_equal(grad, run(pred, target.to(dtype), plan, 0.0, "eager")[1])
    assert_scalars(ours, reference)


@both_forms
def test_spans_longer_than_a_tile(masked_only: bool, triton_device: torch.device) -> None:
    # Where predictions of a tile stand follows from the first kept token after it: here, tiles further on,
    # or never.
    mask = torch.zeros(3, 150, dtype=torch.bool, device=triton_device)
    mask[0, 3:123] = mask[1, 30:] = mask[2, :120] = True
    plan = MaskPlan.from_mask(mask, 3)
    pred, target = (torch.randn(n, 150, 3, device=triton_device) for n in (3, 1))
    pred = pred[mask].view(3, 120, 3) if masked_only else pred
    ours, grad = run(pred, target, plan, 0.0, "triton")
    assert_bitwise_equal(grad, run(pred, target, plan, 0.0, "eager")[1])
    assert_scalars(ours, exact(pred, target, plan, 0.0)[0])


@both_forms
@pytest.mark.parametrize("apart", [0.0, 7.0])
def test_variances_with_large_means(apart: float, masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case((2, 4, 70, 35, 20), masked_only, triton_device)
    pred, target = pred.detach() + 1000, target + 1000 + apart
    ours, _ = run(pred, target, plan, 0.0, "triton")
    assert_scalars(ours, exact(pred, target, plan, 0.0)[0])


@both_forms
def test_small_deviations_from_a_large_mean(masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case((2, 4, 70, 35, 8), masked_only, triton_device)
    pred, target = pred.detach() * 0.01 + 1000, target * 0.01 + 1000
    ours, _ = run(pred, target, plan, 0.0, "triton")
    assert_scalars(ours, exact(pred, target, plan, 0.0)[0])


@both_forms
@pytest.mark.parametrize("value", [0.25, 1000.1])
def test_collapsed_channels_have_the_floor_variance(
    value: float, masked_only: bool, triton_device: torch.device
) -> None:
    pred, target, plan = make_case((2, 4, 70, 35, 8), masked_only, triton_device)
    collapsed = torch.full_like(pred, value).detach()
    ours, _ = run(collapsed, target, plan, 0.0, "triton")
    # Predictions are pred - target + target here; far apart, that rounds.
    assert ours.pred_var.item() == pytest.approx(1e-3, rel=1e-6 if value < 1 else 2e-3)
    ours, _ = run(pred, torch.full_like(target, value), plan, 0.0, "triton")
    assert ours.target_var.item() == pytest.approx(1e-3, rel=1e-6)


@both_forms
def test_a_non_finite_prediction_shows(masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case(SHAPES["small"], True, triton_device)
    pred = pred.detach()
    pred[3, 2, 1] = float("nan")
    if not masked_only:
        everywhere = pred.new_zeros(6, 8, 6)
        everywhere[plan.mask] = pred.flatten(0, 1)
        pred = everywhere
    for beta in (0.0, 0.5):
        ours, grad = run(pred, target, plan, beta, "triton")
        _, eager_grad = run(pred, target, plan, beta, "eager")
        assert ours.loss.isnan() and ours.pred_var.isnan() and ours.target_var.isfinite()
        assert torch.equal(grad.isnan(), eager_grad.isnan())


@both_forms
def test_memory_not_yet_written_is_not_read(
    masked_only: bool, triton_device: torch.device, poisoned_empty: None
) -> None:
    case = make_case((2, 3, 40, 21, 6), masked_only, triton_device)
    ours, grad = run(*case, 0.0, "triton")
    assert grad.isfinite().all() and all(value.isfinite() for value in ours)
    if not masked_only:
        plan = case[2]
        assert_bitwise_equal(grad[~plan.mask], torch.zeros_like(grad[~plan.mask]))
        assert (grad[plan.mask] != 0).all()


@both_forms
def test_scale(masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case(SHAPES["small"], masked_only, triton_device)
    losses = [
        masked_regression_loss(pred, target, plan, 0.5, scale, backend="triton") for scale in (1.0, 0.25)
    ]
    assert losses[1].loss.item() == losses[0].loss.item() / 4
    gradients = [torch.autograd.grad(out.loss, pred)[0] for out in losses]
    assert_bitwise_equal(gradients[1], gradients[0] / 4)


@both_forms
def test_repeats_bitwise_and_leaves_inputs_alone(masked_only: bool, triton_device: torch.device) -> None:
    case = make_case((2, 17, 40, 21, 6), masked_only, triton_device)
    before = [case[0].detach().clone(), case[1].clone()]
    runs = [run(*case, 0.0, "triton", 0.3) for _ in range(2)]
    for first, second in zip((*runs[0][0], runs[0][1]), (*runs[1][0], runs[1][1]), strict=True):
        assert_bitwise_equal(first, second)
    for value, copy in zip(case, before, strict=False):
        assert_bitwise_equal(value.detach(), copy)


@both_forms
def test_any_strides(masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case((2, 3, 40, 21, 6), masked_only, triton_device)
    expected = run(pred, target, plan, 0.0, "triton")
    wider = torch.cat([pred, pred], 2).detach()[..., :6]
    batch_first = pred.detach().transpose(0, 1).contiguous().transpose(0, 1)
    channels_apart = pred.detach().transpose(1, 2).contiguous().transpose(1, 2)
    cut = torch.cat([target, target], 1)[:, :40]
    for strided in (wider, batch_first, channels_apart):
        assert not strided.is_contiguous()
        ours = run(strided, cut, plan, 0.0, "triton")
        for actual, value in zip((*ours[0], ours[1]), (*expected[0], expected[1]), strict=True):
            assert_bitwise_equal(actual, value)
    with record_launches() as launches:
        masked_regression_loss(wider, cut, plan, backend="triton")
    assert [launches[0].args[i].data_ptr() for i in range(2)] == [wider.data_ptr(), cut.data_ptr()]


def test_a_plan_with_a_transposed_mask(triton_device: torch.device) -> None:
    pred, target, plan = make_case(SHAPES["small"], True, triton_device)
    permuted = MaskPlan.from_mask(plan.mask.t().contiguous().t(), 3)
    for ours, expected in zip(*(run(pred, target, p, 0.0, "triton") for p in (permuted, plan)), strict=True):
        assert all(map(torch.equal, ours, expected))


@both_forms
def test_nothing_masked(masked_only: bool, triton_device: torch.device) -> None:
    plan = MaskPlan.from_mask(torch.zeros(4, 3, dtype=torch.bool, device=triton_device), 2)
    pred = torch.randn(4, 0 if masked_only else 3, 5, device=triton_device)
    out, grad = run(pred, torch.randn(2, 3, 5, device=triton_device), plan, 0.0, "triton")
    assert [value.item() for value in out] == [0.0, 0, 0.0, 0.0]
    assert torch.equal(grad, torch.zeros_like(pred))


@pytest.mark.parametrize(("samples", "width"), [(0, 5), (2, 0)])
def test_zero_sizes(samples: int, width: int, triton_device: torch.device) -> None:
    mask = torch.tensor([[True, False, True]], device=triton_device).repeat(2 * samples, 1)
    plan = MaskPlan(mask, mask.int()[:, :1] * 0 + 1, -mask.int(), 2)
    pred = torch.randn(2 * samples, 3, width, device=triton_device)
    out, grad = run(pred, torch.randn(samples, 3, width, device=triton_device), plan, 0.0, "triton")
    assert out.loss.item() == out.pred_var.item() == 0 and grad.shape == pred.shape


def test_retained_graph_gives_the_gradient_twice(triton_device: torch.device) -> None:
    for masked_only in (False, True):
        pred, target, plan = make_case(SHAPES["small"], masked_only, triton_device)
        loss = masked_regression_loss(pred, target, plan, backend="triton").loss * 3
        first = torch.autograd.grad(loss, pred, retain_graph=True)[0].clone()
        assert_bitwise_equal(torch.autograd.grad(loss, pred)[0], first)


def test_double_backward_is_refused(triton_device: torch.device) -> None:
    pred, target, plan = make_case(SHAPES["small"], True, triton_device)
    loss = masked_regression_loss(pred, target, plan, backend="triton").loss * pred.sum()
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@both_forms
def test_launches_and_memory(masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case((2, 3, 40, 21, 6), masked_only, triton_device)
    with record_launches() as launches:
        loss = masked_regression_loss(pred, target, plan, backend="triton").loss
    assert len(launches) == 2
    with record_launches() as launches:
        loss.backward()
    assert len(launches) == 1
    with record_launches() as launches, torch.no_grad():
        masked_regression_loss(pred, target, plan, backend="triton")
    assert launches[0].args[3] is None  # no gradient is written


def test_the_backward_allocates_no_second_gradient() -> None:
    if torch.cuda.is_available():
        pytest.skip("counts CPU memory")
    pred, target, plan = make_case((1, 2, 64, 32, 64), True, torch.device("cpu"))
    out = [masked_regression_loss(pred, target, plan, backend="triton").loss]
    assert peak_memory(lambda: out.pop().backward()) < pred.numel() * 4


def loss_sum(pred: Tensor, target: Tensor, plan: MaskPlan) -> Tensor:
    out = masked_regression_loss(pred, target, plan, 0.5, backend="triton")
    return out.loss / out.count + 0 * (out.pred_var + out.target_var)


@pytest.mark.parametrize("dynamic", [False, True])
@both_forms
def test_compiles_without_graph_breaks(masked_only: bool, dynamic: bool, triton_device: torch.device) -> None:
    torch._dynamo.reset()  # the cases share one function, whose recompilations are counted together
    compiled = torch.compile(loss_sum, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 3, 8, 5, 6), (3, 2, 9, 4, 6)):
        case = make_case(shape, masked_only, triton_device)
        results = [function(*case) for function in (compiled, loss_sum)]
        assert_bitwise_equal(*(result.detach() for result in results))
        assert_bitwise_equal(*(torch.autograd.grad(result, case[0])[0] for result in results))


def test_under_checkpointing_and_autocast(triton_device: torch.device) -> None:
    pred, target, plan = make_case(SHAPES["small"], False, triton_device)
    expected = torch.autograd.grad(loss_sum(pred, target, plan), pred)[0]
    again = checkpoint(loss_sum, pred, target, plan, use_reentrant=False)
    assert_bitwise_equal(torch.autograd.grad(again, pred)[0], expected)
    with torch.autocast(triton_device.type, torch.bfloat16):
        loss = loss_sum(pred, target, plan)
    assert loss.dtype == torch.float32
    assert_bitwise_equal(torch.autograd.grad(loss, pred)[0], expected)


@both_forms
def test_opcheck(masked_only: bool, triton_device: torch.device) -> None:
    ops = torch.ops.d2vkern
    pred, target, plan = make_case((2, 3, 8, 5, 6), masked_only, triton_device)
    # opcheck compares results of repeated calls, and NaN equals nothing.
    pred, target = pred.detach().nan_to_num(), target.nan_to_num()
    permuted = pred.transpose(0, 1).contiguous().transpose(0, 1)
    for beta, needs_grad in ((0.0, True), (0.5, False)):
        args = (permuted, target, plan.slot, 5, 3, beta, 0.3, needs_grad)
        torch.library.opcheck(ops.loss_fwd.default, args)
    dloss = torch.tensor(0.7, device=triton_device)
    torch.library.opcheck(ops.loss_bwd.default, (pred, dloss, plan.slot, 5, 0.0, 0.3))
    torch.library.opcheck(ops.loss_bwd_.default, (pred.clone(), dloss, plan.slot, 5, 0.0, 0.3))


def test_refusals() -> None:
    pred, target, plan = make_case(SHAPES["small"], True, torch.device("cpu"))
    with pytest.raises(BackendError, match="loss: .* fp64 tensors run on eager only"):
        masked_regression_loss(pred.double(), target, plan, backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="loss: .* Triton's interpreter is wrong in bf16"):
            masked_regression_loss(pred.bfloat16(), target, plan, backend="triton")


@pytest.mark.gpu
@both_forms
def test_offsets_past_31_bits(masked_only: bool, triton_device: torch.device) -> None:
    # The last of the rows lies past 2^31 elements; the others are zero.
    samples, clones, tokens, width = 70, 16, 2048, 1024
    mask = torch.zeros(samples * clones, tokens, dtype=torch.bool, device=triton_device)
    mask[:, 1:] = True
    plan = MaskPlan.from_mask(mask, clones)
    places = tokens - 1 if masked_only else tokens
    pred = torch.zeros(samples * clones, places, width, dtype=torch.bfloat16, device=triton_device)
    target = torch.zeros(samples, tokens, width, device=triton_device)
    pred[-1, -5:] = torch.randn(5, width, device=triton_device)
    out, grad = run(pred, target, plan, 0.0, "triton")
    expected = pred[-1].float() * (2 * width**-0.5)
    assert_bitwise_equal(grad[-1], expected.to(torch.bfloat16))
    torch.testing.assert_close(out.loss, pred[-1].float().square().sum() * width**-0.5)


@pytest.mark.gpu
@both_forms
def test_captured_in_a_cuda_graph(masked_only: bool, triton_device: torch.device) -> None:
    pred, target, plan = make_case((2, 8, 70, 35, 96), masked_only, triton_device, torch.bfloat16)
    torch.autograd.grad(loss_sum(pred, target, plan), pred)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_sum(pred, target, plan)
        (grad,) = torch.autograd.grad(loss, pred)
    with torch.no_grad():
        pred.mul_(1.5)
    for _ in range(2):
        graph.replay()
    expected = loss_sum(pred, target, plan)
    assert_bitwise_equal(loss.detach(), expected.detach())
    assert_bitwise_equal(grad, torch.autograd.grad(expected, pred)[0])
