"""Masked regression loss: values and gradients against torch's losses on explicitly gathered rows."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2vkern.ops.loss import LossOutput, masked_regression_loss
from d2vkern.ops.masks import MaskPlan
from d2vkern.reference import loss as reference
from d2vkern.testing import assert_bitwise_equal, peak_memory

# samples, clones, tokens, masked tokens, width
SHAPES = {
    "plain": (2, 3, 8, 5, 6),
    "one clone": (3, 1, 8, 5, 6),
    "one masked token": (2, 3, 8, 1, 6),
    "all masked": (2, 2, 5, 5, 4),
    "primes": (3, 5, 13, 7, 11),
}
both_forms = pytest.mark.parametrize("masked_only", [False, True], ids=["all tokens", "masked tokens"])


def make_plan(samples: int, clones: int, tokens: int, masked: int) -> MaskPlan:
    order = torch.rand(samples * clones, tokens).argsort(1)
    return MaskPlan.from_mask(order < masked, clones)


def masked_rows(x_NTD: Tensor, plan: MaskPlan) -> Tensor:
    return x_NTD[plan.mask].view(x_NTD.shape[0], -1, x_NTD.shape[2])


def make_case(
    shape: tuple[int, int, int, int, int], masked_only: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, MaskPlan]:
    samples, clones, tokens, masked, width = shape
    plan = make_plan(samples, clones, tokens, masked)
    pred = torch.randn(samples * clones, tokens, width) * torch.linspace(0.2, 2, width) + 1
    pred = (masked_rows(pred, plan) if masked_only else pred).to(dtype)
    return pred.requires_grad_(), torch.randn(samples, tokens, width).to(dtype), plan


def oracle(pred: Tensor, target: Tensor, plan: MaskPlan, beta: float, scale: float) -> tuple[Tensor, ...]:
    """fp64 loss, gradient, pred_var, target_var by repetition and boolean indexing."""
    x = pred.detach().double().requires_grad_()
    rows = x.flatten(0, 1) if x.shape[1] != plan.tokens else x[plan.mask]
    y = target.double().repeat_interleave(plan.clones, 0)[plan.mask]
    penalty = (
        F.mse_loss if beta == 0 else lambda *args, **kwargs: F.smooth_l1_loss(*args, beta=beta, **kwargs)
    )
    loss = penalty(rows, y, reduction="sum") * scale
    (grad,) = torch.autograd.grad(loss, x)

    def spread(rows_RD: Tensor) -> Tensor:
        return (rows_RD.var(0) + 1e-6).sqrt().mean()

    return loss.detach(), grad, spread(rows.detach()), spread(y)


@both_forms
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_torch(shape: tuple[int, int, int, int, int], beta: float, masked_only: bool) -> None:
    pred, target, plan = make_case(shape, masked_only)
    out = masked_regression_loss(pred, target, plan, beta)
    loss, grad, pred_var, target_var = oracle(pred, target, plan, beta, 1 / math.sqrt(shape[-1]))
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    (out.loss * 0.25).backward()
    torch.testing.assert_close(pred.grad.double(), grad * 0.25, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.pred_var.double(), pred_var, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.target_var.double(), target_var, rtol=1e-6, atol=0)
    assert out.count.dtype == torch.int64 and out.count.item() == plan.mask.sum()
    assert out.loss.dtype == out.pred_var.dtype == out.target_var.dtype == torch.float32
    assert not out.pred_var.requires_grad and not out.target_var.requires_grad


@both_forms
@pytest.mark.parametrize("rows_per_slice", [1, 2, 4])
def test_slices_of_the_rows_change_nothing(
    rows_per_slice: int, masked_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pred, target, plan = make_case(SHAPES["primes"], masked_only)
    expected = oracle(pred, target, plan, 0.0, 1 / math.sqrt(11))
    monkeypatch.setattr(reference, "SLICE", rows_per_slice * 7 * 11)
    out = masked_regression_loss(pred, target, plan)
    out.loss.backward()
    actual = (out.loss.detach(), pred.grad, out.pred_var, out.target_var)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


@both_forms
def test_gradient_at_kept_places_is_zero_and_written_once(masked_only: bool, poisoned_empty: None) -> None:
    pred, target, plan = make_case(SHAPES["plain"], masked_only)
    masked_regression_loss(pred, target, plan).loss.backward()
    assert pred.grad.isfinite().all()
    if not masked_only:
        assert torch.equal(pred.grad[~plan.mask], torch.zeros_like(pred.grad[~plan.mask]))
        assert (pred.grad[plan.mask] != 0).all()


@both_forms
def test_scale(masked_only: bool) -> None:
    pred, target, plan = make_case(SHAPES["plain"], masked_only)
    unit = masked_regression_loss(pred, target, plan, scale=1.0).loss
    torch.testing.assert_close(masked_regression_loss(pred, target, plan, scale=0.5).loss, unit * 0.5)
    torch.testing.assert_close(masked_regression_loss(pred, target, plan).loss, unit / math.sqrt(6))


def test_smooth_l1_on_both_sides_of_beta() -> None:
    plan = MaskPlan.from_mask(torch.ones(1, 4, dtype=torch.bool), 1)
    pred = torch.tensor([[[0.5], [-0.5], [3.0], [-3.0]]], requires_grad=True)
    out = masked_regression_loss(pred, torch.zeros(1, 4, 1), plan, beta=1.0, scale=1.0)
    out.loss.backward()
    assert out.loss.item() == 2 * 0.125 + 2 * 2.5
    assert pred.grad.flatten().tolist() == [0.5, -0.5, 1.0, -1.0]


@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_predictions_are_scored_in_fp32(dtype: torch.dtype, masked_only: bool) -> None:
    pred, target, plan = make_case(SHAPES["plain"], masked_only, dtype)
    out = masked_regression_loss(pred, target.float(), plan)
    loss, grad, pred_var, _ = oracle(pred, target, plan, 0.0, 1 / math.sqrt(6))
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.pred_var.double(), pred_var, rtol=1e-6, atol=0)
    out.loss.backward()
    assert_bitwise_equal(pred.grad, grad.float().to(dtype))


@both_forms
@pytest.mark.parametrize("beta", [0.0, 0.05, 4.0])
@pytest.mark.parametrize(("scale", "loss_scaling"), [(1e-7, 65536.0), (1e-12, 2.0**36), (2.0**20, 2.0**-20)])
def test_fp16_gradient_of_a_scaled_loss(
    scale: float, loss_scaling: float, beta: float, masked_only: bool
) -> None:
    # Between a small scale and the GradScaler that undoes it nothing is rounded to fp16.
    pred, target, plan = make_case(SHAPES["primes"], masked_only, torch.float16)
    _, grad, _, _ = oracle(pred, target, plan, beta, scale)
    for retain in (True, False):
        loss = masked_regression_loss(pred, target, plan, beta, scale).loss
        (ours,) = torch.autograd.grad(loss * loss_scaling, pred, retain_graph=retain)
        torch.testing.assert_close(ours.double(), grad * loss_scaling, rtol=2.0**-10, atol=2.0**-24)


def test_variance_with_a_large_mean() -> None:
    pred, target, plan = make_case((4, 4, 32, 20, 8), True)
    pred, target = pred.detach() * 0.01 + 1000, target + 1000
    out = masked_regression_loss(pred, target, plan)
    _, _, pred_var, target_var = oracle(pred, target, plan, 0.0, 1.0)
    torch.testing.assert_close(out.pred_var.double(), pred_var, rtol=1e-3, atol=0)
    torch.testing.assert_close(out.target_var.double(), target_var, rtol=1e-3, atol=0)


def test_collapsed_predictions_have_the_floor_variance() -> None:
    _, target, plan = make_case(SHAPES["plain"], True)
    out = masked_regression_loss(torch.full((6, 5, 6), 0.25), target, plan)
    assert out.pred_var.item() == pytest.approx(1e-3)


@both_forms
def test_nothing_masked(masked_only: bool) -> None:
    plan = MaskPlan.from_mask(torch.zeros(4, 3, dtype=torch.bool), 2)
    pred = torch.randn(4, 0 if masked_only else 3, 5, requires_grad=True)
    out = masked_regression_loss(pred, torch.randn(2, 3, 5), plan)
    assert [value.item() for value in out] == [0.0, 0, 0.0, 0.0]
    out.loss.backward()
    assert torch.equal(pred.grad, torch.zeros_like(pred))


def test_a_single_masked_token_has_no_variance() -> None:
    plan = MaskPlan.from_mask(torch.tensor([[True, False]]), 1)
    out = masked_regression_loss(torch.randn(1, 2, 5), torch.randn(1, 2, 5), plan)
    assert out.count.item() == 1
    assert out.pred_var.item() == pytest.approx(1e-3) and out.target_var.item() == pytest.approx(1e-3)


@both_forms
def test_non_contiguous_predictions(masked_only: bool) -> None:
    pred, target, plan = make_case(SHAPES["plain"], masked_only)
    strided = pred.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    wide = torch.cat([pred.detach(), pred.detach()], 2).requires_grad_()
    expected = masked_regression_loss(pred, target, plan)
    expected.loss.backward()
    for leaf, view in ((strided, strided), (wide, wide[..., :6])):
        out = masked_regression_loss(view, target.transpose(0, 1).contiguous().transpose(0, 1), plan)
        out.loss.backward()
        assert_bitwise_equal(out.loss.detach(), expected.loss.detach())
        torch.testing.assert_close(leaf.grad[..., :6], pred.grad, rtol=0, atol=0)


@both_forms
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_gradcheck(beta: float, masked_only: bool) -> None:
    pred, target, plan = make_case((2, 2, 5, 3, 3), masked_only, torch.float64)
    assert torch.autograd.gradcheck(lambda x: masked_regression_loss(x, target, plan, beta).loss, [pred])


def test_retained_graph_gives_the_gradient_twice() -> None:
    pred, target, plan = make_case(SHAPES["plain"], True)
    loss = masked_regression_loss(pred, target, plan).loss * 3
    first = torch.autograd.grad(loss, pred, retain_graph=True)[0].clone()
    assert_bitwise_equal(torch.autograd.grad(loss, pred)[0], first)


def test_double_backward_is_refused() -> None:
    pred, target, plan = make_case(SHAPES["plain"], True)
    loss = masked_regression_loss(pred, target, plan).loss * pred.sum()
    (grad,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@both_forms
def test_repeats_bitwise_and_leaves_inputs_alone(masked_only: bool) -> None:
    pred, target, plan = make_case(SHAPES["primes"], masked_only)
    before = pred.detach().clone(), target.clone()
    runs = []
    for _ in range(2):
        pred.grad = None
        out = masked_regression_loss(pred, target, plan)
        out.loss.backward()
        runs.append((*out, pred.grad))
    for first, second in zip(*runs, strict=True):
        assert_bitwise_equal(first.detach(), second.detach())
    assert_bitwise_equal(pred.detach(), before[0])
    assert_bitwise_equal(target, before[1])


@both_forms
def test_memory_is_the_gradient_and_slices(masked_only: bool) -> None:
    # [N,T,D] is 24 MiB, the masked rows 18 MiB, a slice 1 MiB.
    pred, target, plan = make_case((4, 16, 128, 96, 768), masked_only)
    _ = plan.ids_mask
    gradient = pred.numel() * 4
    slices = 10 * 2**20
    no_grad = peak_memory(torch.no_grad()(lambda: masked_regression_loss(pred, target, plan)))
    assert no_grad < slices
    forward = peak_memory(lambda: masked_regression_loss(pred, target, plan))
    assert gradient <= forward < gradient + slices
    out: list[LossOutput] = [masked_regression_loss(pred, target, plan)]
    backward = peak_memory(lambda: out.pop().loss.backward())
    assert backward < slices


def loss_sum(pred: Tensor, target: Tensor, plan: MaskPlan) -> Tensor:
    out = masked_regression_loss(pred, target, plan, 0.5)
    return out.loss / out.count + 0 * (out.pred_var + out.target_var)


# Dynamo instantiates the Function whose static methods it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@both_forms
def test_compiles_without_graph_breaks(masked_only: bool) -> None:
    pred, target, plan = make_case(SHAPES["plain"], masked_only)
    gradients = []
    functions: list[Callable[..., Tensor]] = [
        loss_sum,
        torch.compile(loss_sum, fullgraph=True, backend="aot_eager", dynamic=masked_only),
    ]
    for function in functions:
        loss = function(pred, target, plan)
        gradients.append(torch.autograd.grad(loss, pred)[0])
        torch.testing.assert_close(loss, loss_sum(pred, target, plan))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("case", ["image_base", "audio_base", "audio_padded", "text_base"])
def test_golden_losses(goldens: Path, case: str) -> None:
    tensors = {name: torch.from_numpy(x) for name, x in np.load(goldens / f"case_{case}.npz").items()}
    scalars = json.loads((goldens / f"case_{case}.json").read_text())["scalars"]
    plan = MaskPlan.from_mask(tensors["in.precomputed_mask"].bool(), 4)
    scale = 1.0 if case == "text_base" else None
    out = masked_regression_loss(tensors["decoder.out"], tensors["targets"], plan, scale=scale)
    (name,) = [name for name in scalars["losses"] if name.endswith("_regression")]
    assert out.loss.item() == pytest.approx(scalars["losses"][name]["sum"], rel=1e-6)
    assert out.count.item() == scalars["sample_size"]
    assert out.pred_var.item() == pytest.approx(scalars["pred_var"], rel=1e-6)
    assert out.target_var.item() == pytest.approx(scalars["target_var"], rel=1e-6)


def test_refusals() -> None:
    pred, target, plan = make_case(SHAPES["plain"], False)
    with pytest.raises(
        ValueError, match=r"loss: pred must have 8 tokens \(all\) or 5 \(the masked ones\) per row, got 7"
    ):
        masked_regression_loss(pred[:, :7], target, plan)
    with pytest.raises(
        ValueError, match=r"loss: pred must have shape \(6, any, any\) like plan, got \(5, 8, 6\)"
    ):
        masked_regression_loss(pred[:5], target, plan)
    with pytest.raises(
        ValueError, match=r"loss: target must have shape \(2, 8, 6\) like plan and pred, got \(2, 8, 5\)"
    ):
        masked_regression_loss(pred, target[..., :5], plan)
    with pytest.raises(ValueError, match="loss: beta must be >= 0.0, got -1"):
        masked_regression_loss(pred, target, plan, beta=-1)
    with pytest.raises(TypeError, match="loss: pred must have dtype .*, got int64"):
        masked_regression_loss(pred.long(), target, plan)
    with pytest.raises(ValueError, match="loss: .* must be on cpu like pred, got meta"):
        masked_regression_loss(pred, target.to("meta"), plan)
