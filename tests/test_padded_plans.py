"""Rows that keep different numbers of tokens: every backend against a loop over the rows."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from d2vkern import (
    MaskPlan,
    _native,
    gather_tokens,
    masked_regression_loss,
    multimask_attention,
    scatter_tokens,
)
from d2vkern.testing import assert_bitwise_equal

M, E = 2, 2
BACKENDS = [
    "eager",
    pytest.param("native", marks=pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())),
    "triton",
]
# name: tokens T, width D, masked tokens of each row
ROWS = {
    "some": (7, 12, (3, 5, 2, 4)),
    "none and all masked": (5, 300, (0, 5, 1, 4)),
    "the first masks nothing": (40, 8, (0, 39, 33, 2)),
    "everything masked": (5, 4, (5, 5, 5, 5)),
    "no rows": (5, 4, ()),
}


rows_and_dtypes = pytest.mark.parametrize(
    ("rows", "dtype"), [*((rows, torch.float32) for rows in ROWS), ("some", torch.float16)], ids=str
)


@pytest.fixture(params=BACKENDS)
def backend(
    request: pytest.FixtureRequest, triton_device: torch.device
) -> Iterator[tuple[str, torch.device]]:
    device = triton_device if request.param == "triton" else torch.device("cpu")
    with torch.device(device):
        yield request.param, device


def plan_of(rows: str) -> MaskPlan:
    tokens, _, masked = ROWS[rows]
    mask = torch.zeros(len(masked), tokens, dtype=torch.bool)
    for row, count in zip(mask, masked, strict=True):
        row[torch.randperm(tokens)[:count]] = True
    return MaskPlan.from_mask(mask, M, pad=True)


def filled(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Random eighths, small enough that fp32 sums of them are exact in any order."""
    return (torch.randint(-16, 17, sizes) / 8).to(dtype)


def nothing_of(out: Tensor, *inputs: Tensor) -> Tensor:
    """An empty output that all inputs lead to."""
    return out.detach() + sum(x.sum() for x in inputs)


def same(
    ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], dout: Tensor
) -> None:
    """The outputs and the gradients of the inputs, bit for bit."""
    assert_bitwise_equal(*(out.detach() for out in (ours, theirs)))
    grads = (torch.autograd.grad(out, inputs, dout, materialize_grads=True) for out in (ours, theirs))
    for one, other in zip(*grads, strict=True):
        assert_bitwise_equal(one, other)


@pytest.mark.parametrize("rows", ROWS)
def test_plans_say_what_each_row_keeps(rows: str) -> None:
    plan, (tokens, _, masked) = plan_of(rows), ROWS[rows]
    assert plan.kept == tokens - min(masked, default=tokens) and plan.masked == max(masked, default=tokens)
    assert plan.kept_lengths.tolist() == [tokens - count for count in masked]
    for row, count in enumerate(plan.kept_lengths.tolist()):
        kept, gone = ((plan.mask[row] == value).nonzero()[:, 0].tolist() for value in (False, True))
        assert plan.ids_keep[row].tolist() == kept + [-1] * (plan.kept - count)
        assert plan.ids_mask[row].tolist() == gone + [-1] * (plan.masked - len(gone))
        assert plan.slot[row, kept].tolist() == list(range(count)) and (plan.slot[row, gone] == -1).all()
    assert torch.equal(plan.attention_lengths(E), plan.kept_lengths + E)


@rows_and_dtypes
def test_gather(rows: str, dtype: torch.dtype, backend, poisoned_empty) -> None:
    name, device = backend
    plan, D = plan_of(rows).to(device), ROWS[rows][1]
    N, T = plan.mask.shape
    sizes = ((N // M, T, D), (E, D), (T, D), (N, T, D))
    x, extra, positions, per_mask = inputs = tuple(filled(*s, dtype=dtype).requires_grad_() for s in sizes)
    out = gather_tokens(x, plan, extra, positions, per_mask, backend=name)
    placed = (x.repeat_interleave(M, 0) + positions) + per_mask
    looped = [torch.cat([extra, placed[n][~plan.mask[n]]]) for n in range(N)]
    looped = [torch.cat([row, row.new_zeros(E + plan.kept - len(row), D)]) for row in looped]
    dout = filled(N, E + plan.kept, D, dtype=dtype)
    if N:
        behind = torch.arange(E + plan.kept) >= plan.attention_lengths(E)[:, None]
        dout[behind] = float("nan")  # whatever arrives at padding
    same(out, torch.stack(looped) if N else nothing_of(out, *inputs), inputs, dout)


@rows_and_dtypes
@pytest.mark.parametrize("keep_extra", [False, True])
def test_scatter_with_a_mask_token(
    rows: str, keep_extra: bool, dtype: torch.dtype, backend, poisoned_empty
) -> None:
    name, device = backend
    plan, D = plan_of(rows).to(device), ROWS[rows][1]
    N, T = plan.mask.shape
    x = filled(N, E + plan.kept, D, dtype=dtype)
    if N:
        x[torch.arange(E + plan.kept) >= plan.attention_lengths(E)[:, None]] = float("nan")
    token = filled(1, 1, D, dtype=dtype).requires_grad_()
    x.requires_grad_()
    out = scatter_tokens(x, plan, mask_token=token, keep_extra=keep_extra, backend=name)
    looped = []
    for n in range(N):
        row = token[0].expand(T, D).clone()
        row[~plan.mask[n]] = x[n, E : E + int(plan.kept_lengths[n])]
        looped.append(torch.cat([x[n, :E], row]) if keep_extra else row)
    wide = filled(N, E * keep_extra + T, 2 * D, dtype=dtype)
    theirs = torch.stack(looped) if N else nothing_of(out, x, token)
    same(out, theirs, (x, token), wide[..., :D])
    (alone,) = torch.autograd.grad(
        scatter_tokens(x.detach(), plan, mask_token=token, keep_extra=keep_extra, backend=name),
        token,
        wide[..., ::2],
    )
    masked = wide[:, E * keep_extra :, ::2].double() * plan.mask[..., None]
    assert torch.equal(alone.double().flatten(), masked.sum((0, 1)))


@pytest.mark.parametrize("keep_extra", [False, True])
def test_noise_is_that_of_the_place(keep_extra: bool, backend) -> None:
    """Of a padded plan as of one row alone."""
    name, device = backend
    plan = plan_of("some").to(device)
    N, T = plan.mask.shape
    x = torch.randn(N, E + plan.kept, 8)
    out = scatter_tokens(x, plan, 0.5, 3, keep_extra=keep_extra, backend=name)
    nothing = MaskPlan.from_mask(torch.ones(N, T), M)
    noise = scatter_tokens(x[:, :0], nothing, 0.5, 3, backend=name)
    for n, count in enumerate(plan.kept_lengths.tolist()):
        assert_bitwise_equal(out[n, E * keep_extra :][plan.mask[n]], noise[n][plan.mask[n]])
        assert_bitwise_equal(out[n, E * keep_extra :][~plan.mask[n]], x[n, E : E + count])
    if keep_extra:
        assert_bitwise_equal(out[:, :E], x[:, :E])


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_loss(rows: str, compact: bool, beta: float, backend, poisoned_empty) -> None:
    name, device = backend
    name = "eager" if name == "native" else name
    plan, D = plan_of(rows).to(device), ROWS[rows][1]
    N, T = plan.mask.shape
    everything = torch.randn(N, T, D)
    target = torch.randn(N // M, T, D)
    pred = torch.full((N, plan.masked if compact else T, D), float("nan"))
    compact = compact and plan.masked < T  # else all tokens are meant
    for n in range(N):
        masked = plan.mask[n].nonzero()[:, 0]
        pred[n, : len(masked)] = everything[n, masked]
        if not compact:
            pred[n, masked] = everything[n, masked]
    pred.requires_grad_()
    ours = masked_regression_loss(pred, target, plan, beta, backend=name)
    x, y = everything[plan.mask].double(), target.repeat_interleave(M, 0)[plan.mask].double()
    x.requires_grad_()
    if beta:
        loss = torch.nn.functional.smooth_l1_loss(x, y, beta=beta, reduction="sum") / D**0.5
    else:
        loss = (x - y).square().sum() / D**0.5
    assert int(ours.count) == len(x)
    torch.testing.assert_close(ours.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for spread, values in ((ours.pred_var, x), (ours.target_var, y)):
        expected = (values.var(0) + 1e-6).sqrt().mean().detach() if len(x) > 1 else torch.zeros(()).double()
        torch.testing.assert_close(spread.double(), expected, rtol=1e-5, atol=1e-6)
    (dpred,) = torch.autograd.grad(3.0 * ours.loss, pred)
    (dx,) = torch.autograd.grad(3.0 * loss, x)
    if compact:
        assert torch.equal(dpred[plan.ids_mask < 0].abs().sum(), torch.zeros(()))
        torch.testing.assert_close(dpred[plan.ids_mask >= 0].double(), dx, rtol=1e-5, atol=1e-6)
    else:
        assert (dpred[~plan.mask] == 0).all()
        torch.testing.assert_close(dpred[plan.mask].double(), dx, rtol=1e-5, atol=1e-6)


def test_gradients_in_double() -> None:
    plan = plan_of("some")
    N, T = plan.mask.shape
    target = torch.randn(N // M, T, 3).double()
    leaves = [
        torch.randn(s).double().requires_grad_() for s in ((N // M, T, 3), (E, 3), (T, 3), (N, T, 3), (3,))
    ]

    def walk(x: Tensor, extra: Tensor, positions: Tensor, per_mask: Tensor, token: Tensor) -> Tensor:
        kept = gather_tokens(x, plan, extra, positions, per_mask, backend="eager")
        placed = scatter_tokens(kept.sin(), plan, mask_token=token, keep_extra=True, backend="eager")
        loss = masked_regression_loss(placed[:, E:], target, plan, backend="eager").loss
        return torch.cat([placed.flatten(), loss[None]])

    assert torch.autograd.gradcheck(walk, leaves)


def dense_attention(x: Tensor, weight: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Over all T tokens with the masked keys forbidden."""
    N, T, D = x.shape
    q, k, v = (x @ weight).view(N, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None, None])
    return out.transpose(1, 2).reshape(N, T, D)


def test_wav2vec2_masks_through_the_ops_and_dense(backend) -> None:
    """wav2vec 2.0's own masks, which mask 15, 20, 17 and so on tokens of a row."""
    modeling = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")
    import numpy as np

    name, device = backend
    B, T, D, H = 2, 24, 16, 2
    np.random.seed(0)
    drawn = modeling._compute_mask_indices((B * M, T), mask_prob=0.4, mask_length=3)
    assert len(set(drawn.sum(1))) > 1
    plan = MaskPlan.from_mask(torch.from_numpy(drawn).to(device), M, pad=True)
    x, weight, token = torch.randn(B, T, D), torch.randn(D, 3 * D) / 4, torch.randn(D)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, token)]
    of = (lambda op: "eager") if name != "triton" else (lambda op: "triton")

    kept = gather_tokens(x, plan, backend=name)
    qkv = (kept @ weight).view(*kept.shape[:2], 3, H, D // H)
    seen = multimask_attention(qkv, lengths=plan.attention_lengths(), backend=of("attention"))
    decoded = scatter_tokens(seen, plan, mask_token=token, backend=name)
    target = torch.randn(B, T, D)
    ours = masked_regression_loss(decoded.cumsum(1), target, plan, backend=of("loss")).loss

    repeated = x.repeat_interleave(M, 0)
    dense = dense_attention(repeated, weight, H, ~plan.mask)
    dense = torch.where(plan.mask[..., None], token, dense).cumsum(1)
    error = dense - target.repeat_interleave(M, 0)
    theirs = (error * plan.mask[..., None]).square().sum() / D**0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grads = (torch.autograd.grad(loss, leaves) for loss in (ours, theirs))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
