"""multimask_attention against attention with a materialised bias; gradients, padding, dropout, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from d2vkern import multimask_attention
from d2vkern.reference import attention as reference
from d2vkern.reference._dropout import keep_mask
from d2vkern.testing import assert_bitwise_equal, live_memory, peak_memory

from .op_checks import (
    assert_equals_plain,
    assert_low_precision,
    assert_repeats,
    leaf,
    spread,
    values_and_gradients,
)

# N, S, H, Dh
SHAPES = {
    "image student": (6, 9, 4, 8),
    "one token": (5, 1, 2, 4),
    "one sequence, one head": (1, 6, 1, 3),
    "primes": (5, 13, 3, 7),
}
Shape = tuple[int, int, int, int]
SCALE = (1.3, -0.5, 0.7, 0.2)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
padded_rows = pytest.mark.parametrize("padded_rows", ["zero", "attend"])


def make_positions(n: int, s: int, extra: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """[N,S]: -1 for the extra tokens, then ascending places in 3 S."""
    places = torch.rand(n, 3 * s).argsort(1)[:, : s - extra].sort(1).values
    return torch.cat([torch.full((n, extra), -1), places], 1).to(dtype)


def make_lengths(n: int, s: int) -> Tensor:
    """All, one, none, some ... of the tokens."""
    cases = [s, 1, 0, max(1, s // 2), s]
    return torch.tensor([cases[i % 5] for i in range(n)], dtype=torch.int32)


def make_case(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, alibi_scale (one negative), slopes, positions."""
    n, s, h, d = shape
    scale = torch.tensor(SCALE[:h], dtype=dtype, requires_grad=True)
    return leaf(n, s, 3, h, d, dtype=dtype), scale, torch.rand(h, dtype=dtype) + 0.1, make_positions(n, s)


def materialised_bias(positions: Tensor, slopes: Tensor, alibi_scale: Tensor | None) -> Tensor:
    """[N,H,S,S], pair by pair."""
    distance = [
        [[abs(a - b) if min(a, b) >= 0 else 0 for b in row] for a in row] for row in positions.tolist()
    ]
    factor = slopes if alibi_scale is None else slopes * alibi_scale.clamp_min(0)
    return -torch.tensor(distance).unsqueeze(1) * factor.view(1, -1, 1, 1)


def plain(
    qkv: Tensor,
    alibi_scale: Tensor | None = None,
    slopes: Tensor | None = None,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    padded_rows: str = "zero",
    keep: Tensor | None = None,
) -> Tensor:
    n, s, _, h, d = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) * (d**-0.5 if softmax_scale is None else softmax_scale)
    if slopes is not None and positions is not None:
        logits = logits + materialised_bias(positions, slopes, alibi_scale).to(logits.dtype)
    padded = torch.zeros(n, s, dtype=torch.bool)
    if lengths is not None:
        padded = torch.stack([torch.arange(s) >= length for length in lengths.tolist()])
        logits = logits.masked_fill((padded & (lengths > 0)[:, None])[:, None, None], float("-inf"))
    p = logits.softmax(-1)
    if keep is not None:
        p = p * keep
    out = (p @ v).transpose(1, 2).reshape(n, s, h * d)
    return out.masked_fill(padded[..., None], 0) if padded_rows == "zero" else out


def op(qkv: Tensor, alibi_scale: Tensor | None = None, *rest: Tensor | None, **settings: Any) -> Tensor:
    """The op with `plain`'s positional arguments."""
    names = ("slopes", "positions", "lengths")
    return multimask_attention(
        qkv, alibi_scale=alibi_scale, **dict(zip(names, rest, strict=False)), **settings
    )


@shapes
def test_without_bias(shape: Shape) -> None:
    assert_equals_plain(op, plain, [make_case(shape)[0]], 1e-12)
    assert_equals_plain(
        lambda x: op(x, softmax_scale=0.4),
        lambda x: plain(x, softmax_scale=0.4),
        [make_case(shape)[0]],
        1e-12,
    )


@shapes
@pytest.mark.parametrize("extra", [0, 1], ids=["no extra token", "sentinel"])
def test_with_alibi(shape: Shape, extra: int) -> None:
    qkv, scale, slopes, _ = make_case(shape)
    positions = make_positions(shape[0], shape[1], extra)
    assert_equals_plain(op, plain, [qkv, scale, slopes, positions], 1e-12)
    assert_bitwise_equal(
        op(qkv, scale, slopes, positions).detach(), op(qkv, scale, slopes, positions.long()).detach()
    )


def test_no_scale_is_a_scale_of_one() -> None:
    qkv, _, slopes, positions = make_case(SHAPES["primes"])
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(op(qkv, None, slopes, positions), op(qkv, ones, slopes, positions))


@padded_rows
@shapes
def test_with_lengths(shape: Shape, padded_rows: str) -> None:
    qkv, scale, slopes, positions = make_case(shape)
    inputs = [qkv, scale, slopes, positions, make_lengths(shape[0], shape[1])]
    assert_equals_plain(
        lambda *x: op(*x, padded_rows=padded_rows),
        lambda *x: plain(*x, padded_rows=padded_rows),
        inputs,
        1e-12,
    )


def test_padded_queries_and_keys() -> None:
    qkv, scale, slopes, positions = make_case(SHAPES["primes"])
    lengths = make_lengths(5, 13)
    out = {rows: op(qkv, scale, slopes, positions, lengths, padded_rows=rows) for rows in ("zero", "attend")}
    for n, length in enumerate(lengths.tolist()):
        assert (out["zero"][n, length:] == 0).all()
        torch.testing.assert_close(out["zero"][n, :length], out["attend"][n, :length])
        if length:
            alone = op(qkv[n : n + 1, :length], scale, slopes, positions[n : n + 1, :length])
            torch.testing.assert_close(out["attend"][n, :length], alone[0])
        assert (out["attend"][n] != 0).all() and out["attend"][n].isfinite().all()
    dqkv = torch.autograd.grad(out["zero"].sum(), qkv)[0]
    assert (dqkv[1, 1:] == 0).all() and (dqkv[2] == 0).all(), "padding leaked into a gradient"


def test_a_clamped_scale_has_a_gradient_of_exactly_zero() -> None:
    qkv, scale, slopes, positions = make_case(SHAPES["image student"])
    dscale = values_and_gradients(op, [qkv, scale, slopes, positions])[2]
    assert dscale[1] == 0 and (dscale[[0, 2, 3]] != 0).all()


def test_a_scale_of_zero_is_not_clamped() -> None:
    # as torch's clamp_min, which the original differentiates
    qkv, _, slopes, positions = make_case(SHAPES["primes"])
    scale = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert_equals_plain(op, plain, [qkv, scale, slopes, positions], 1e-12)


@padded_rows
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float, padded_rows: str) -> None:
    qkv, scale, slopes, positions = make_case((3, 5, 3, 2))
    lengths = torch.tensor([5, 3, 0])

    def run(qkv: Tensor, scale: Tensor) -> Tensor:
        return op(
            qkv, scale, slopes, positions, lengths, dropout_p=dropout_p, seed=9, padded_rows=padded_rows
        )

    assert torch.autograd.gradcheck(run, (qkv, scale))


def test_dropout_is_the_counter_mask_on_probabilities() -> None:
    n, s, h, _ = shape = SHAPES["primes"]
    keep = keep_mask((n, h, s, s), 0.3, torch.device("cpu"), seed=9).double() / 0.7
    assert_equals_plain(
        lambda *x: op(*x, dropout_p=0.3, seed=9), lambda *x: plain(*x, keep=keep), make_case(shape), 1e-12
    )


def test_unseeded_dropout_follows_torchs_generator() -> None:
    qkv = leaf(3, 12, 3, 2, 4)

    def run() -> list[Tensor]:
        return values_and_gradients(lambda x: op(x, dropout_p=0.4), [qkv])

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert_bitwise_equal(run()[1], first[1])
    assert not torch.equal(first[0], second[0])


def test_unseeded_dropout_has_one_mask_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    # The output is linear in v, so its change along v must equal the gradient, chunk by chunk.
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
    qkv = leaf(4, 6, 3, 2, 3)
    step = torch.zeros_like(qkv)
    step[:, :, 2] = torch.randn(4, 6, 2, 3, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return op(x, dropout_p=0.4)

    out = run(qkv)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    torch.testing.assert_close((grad * step).sum(), ((run(qkv + step) - out) * dout).sum())


def test_dropout_keeps_the_mean() -> None:
    qkv = torch.randn(1, 16, 3, 2, 4).expand(400, -1, -1, -1, -1)
    mean = op(qkv, dropout_p=0.25).mean(0)
    torch.testing.assert_close(mean, op(qkv[:1])[0], rtol=0, atol=0.12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "alibi"])
def test_low_precision(dtype: torch.dtype, bias: bool) -> None:
    qkv, scale, slopes, positions = make_case((6, 24, 4, 16), torch.float32)
    if not bias:
        assert_low_precision(op, plain, [qkv], dtype)
        return
    lengths = make_lengths(6, 24)
    assert_low_precision(
        lambda x, scale: op(x, scale, slopes, positions, lengths),
        lambda x, scale: plain(x, scale, slopes.to(scale.dtype), positions, lengths),
        [qkv, scale],
        dtype,
        masters=True,
    )


def test_large_logits_stay_finite() -> None:
    qkv = leaf(2, 8, 3, 2, 4, dtype=torch.float16, scale=100.0)
    assert all(x.isfinite().all() for x in values_and_gradients(op, [qkv]))


@padded_rows
def test_repeats_bitwise(padded_rows: str) -> None:
    qkv, scale, slopes, positions = make_case(SHAPES["primes"], torch.float32)
    lengths = make_lengths(5, 13)
    assert_repeats(
        lambda *x: op(*x, positions, lengths, dropout_p=0.2, seed=4, padded_rows=padded_rows),
        [qkv, scale, slopes],
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_case((7, 11, 2, 4))
    lengths = make_lengths(7, 11)

    def run(bytes_: int) -> list[Tensor]:
        monkeypatch.setattr(reference, "CHUNK_BYTES", bytes_)
        return values_and_gradients(lambda *x: op(*x, lengths, dropout_p=0.3, seed=9), inputs)

    whole = run(1 << 30)
    for bytes_ in (1, 2 * 11 * 11 * 4 * 3):  # one sequence, three sequences at a time
        for actual, expected in zip(run(bytes_), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_non_contiguous_inputs() -> None:
    qkv, scale, slopes, positions = make_case(SHAPES["primes"])
    expected = values_and_gradients(op, [qkv, scale, slopes, positions])
    wide = torch.cat([qkv.detach(), qkv.detach()], 4)[..., :7].requires_grad_()
    for view in (spread(qkv), wide):
        assert not view.is_contiguous()
        actual = values_and_gradients(op, [view, spread(scale), slopes, spread(positions)])
        for ours, theirs in zip(actual, expected, strict=True):
            assert_bitwise_equal(ours.contiguous(), theirs)
    repeated = qkv[:1].detach().expand(4, -1, -1, -1, -1)
    torch.testing.assert_close(op(repeated), op(qkv[:1]).expand(4, -1, -1))


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (3, 0, 2, 4)], ids=["no sequences", "no tokens"])
def test_zero_size(shape: Shape) -> None:
    n, s, h, d = shape
    scale = torch.ones(h, dtype=torch.float64, requires_grad=True)
    positions, lengths = torch.zeros(n, s, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    inputs = [leaf(n, s, 3, h, d), scale, torch.ones(h, dtype=torch.float64), positions, lengths]
    out, dqkv, dscale = values_and_gradients(op, inputs)
    assert out.shape == (n, s, h * d) and dqkv.shape == (n, s, 3, h, d)
    assert dscale.tolist() == [0.0, 0.0]


def test_gradients_on_request_only() -> None:
    qkv, scale, slopes, positions = make_case(SHAPES["primes"])
    op(qkv, scale.detach(), slopes, positions).sum().backward()
    assert qkv.grad is not None
    op(qkv.detach(), scale, slopes, positions).square().sum().backward()
    assert scale.grad is not None
    assert not op(qkv.detach(), scale.detach(), slopes, positions).requires_grad


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "alibi"])
def test_no_scores_are_held(bias: bool) -> None:
    n, s, h, d = shape = (128, 128, 4, 8)
    scores = n * h * s * s * 4  # 32 MiB; the output is 2 MiB, a chunk of scores as much
    qkv, scale, slopes, positions = make_case(shape, torch.float32)
    given = (qkv, scale, slopes, positions) if bias else (qkv,)
    out, held = live_memory(lambda: op(*given))
    assert out.nbytes <= held < out.nbytes + 2**20
    assert peak_memory(lambda: op(*given)) < scores
    dout = torch.ones_like(out)
    assert peak_memory(lambda: torch.autograd.grad(out, qkv, dout)) < scores + qkv.nbytes


# Dynamo instantiates the Function whose static methods it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@padded_rows
def test_compiled_equals_uncompiled(padded_rows: str) -> None:
    torch._dynamo.reset()
    qkv, scale, slopes, positions = make_case(SHAPES["primes"], torch.float32)
    lengths = make_lengths(5, 13)

    def run(qkv: Tensor, scale: Tensor) -> Tensor:
        return op(qkv, scale, slopes, positions, lengths, dropout_p=0.3, seed=5, padded_rows=padded_rows)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equals_plain(compiled, run, [qkv, scale], 1e-5)
    torch._dynamo.reset()


def test_double_backward_is_refused() -> None:
    qkv = leaf(2, 3, 3, 1, 2)
    (grad,) = torch.autograd.grad(op(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


QKV = torch.zeros(2, 5, 3, 4, 8)
POSITIONS = torch.zeros(2, 5, dtype=torch.int32)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "qkv shape": (
        {"qkv": QKV[:, :, :2]},
        ValueError,
        r"attention: qkv must have shape \(N, S, 3, H, Dh\), got \(2, 5, 2, 4, 8\)",
    ),
    "qkv dtype": ({"qkv": QKV.long()}, TypeError, "attention: qkv must have dtype .*, got int64"),
    "no tensor": ({"qkv": None}, TypeError, "attention: qkv must be a tensor, got NoneType"),
    "head width": (
        {"qkv": QKV[..., :0]},
        ValueError,
        "attention: head width Dh must be >= 1, got 0",
    ),
    "positions shape": (
        {"positions": POSITIONS[:, :4]},
        ValueError,
        r"attention: positions must have shape \(2, 5\) like qkv, got \(2, 4\)",
    ),
    "positions dtype": (
        {"positions": POSITIONS.float()},
        TypeError,
        "attention: positions must have dtype int64 or int32, got float32",
    ),
    "slopes without positions": (
        {"slopes": torch.ones(4)},
        ValueError,
        "attention: positions must be given with slopes, got None",
    ),
    "slopes shape": (
        {"slopes": torch.ones(3), "positions": POSITIONS},
        ValueError,
        r"attention: slopes must have shape \(4,\) like qkv, got \(3,\)",
    ),
    "slopes dtype": (
        {"slopes": torch.ones(4).half(), "positions": POSITIONS},
        TypeError,
        "attention: slopes must have dtype float32 or float64, got float16",
    ),
    "scale without slopes": (
        {"alibi_scale": torch.ones(4)},
        ValueError,
        "attention: slopes must be given with alibi_scale, got None",
    ),
    "lengths shape": (
        {"lengths": torch.ones(3, dtype=torch.int32)},
        ValueError,
        r"attention: lengths must have shape \(2,\) like qkv, got \(3,\)",
    ),
    "lengths dtype": (
        {"lengths": torch.ones(2)},
        TypeError,
        "attention: lengths must have dtype int64 or int32, got float32",
    ),
    "device": (
        {"lengths": torch.ones(2, dtype=torch.int32, device="meta")},
        ValueError,
        "attention: lengths must be on cpu like qkv, got meta",
    ),
    "dropout": ({"dropout_p": 1.0}, ValueError, "attention: dropout_p must be >= 0.0 and < 1.0, got 1.0"),
    "padded rows": (
        {"padded_rows": "keep"},
        ValueError,
        "attention: padded_rows must be one of 'zero', 'attend', got 'keep'",
    ),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multimask_attention(**{"qkv": QKV, **changed})
