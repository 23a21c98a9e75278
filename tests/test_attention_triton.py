"""Triton multimask_attention beside eager: values, gradients, padding, bias, dropout's bits, properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from d2vkern import BackendError, multimask_attention  # noqa: E402
from d2vkern.reference._dropout import keep_mask  # noqa: E402
from d2vkern.testing import assert_bitwise_equal  # noqa: E402

from .attention_cases import (  # noqa: E402
    ATTEND,
    CASES,
    SCALES,
    SEED,
    Case,
    assert_matches_eager,
    dropout,
    in_few_programs,  # noqa: F401
)
from .op_checks import assert_repeats, spread, values_and_gradients  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_few_programs")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SHORT = Case(shape=(3, 11, 2, 16), extra=1, lengths=(11, 5, 0))
LONG = Case(shape=(1, 67, 1, 16), extra=1, lengths=(65,))
both = pytest.mark.parametrize("case", [SHORT, LONG], ids=["one tile", "tiles"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_matches_eager(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    case = CASES[name]
    out, dqkv, *dscale = assert_matches_eager(case, case.inputs(triton_device, dtype))
    assert out.dtype == dqkv.dtype == dtype and out.isfinite().all() and dqkv.isfinite().all()
    for gradient in dscale:
        assert gradient.dtype == torch.float32
        clamped = torch.tensor([SCALES[i % 4] < 0 for i in range(case.shape[2])])
        assert (gradient.cpu()[clamped] == 0).all()


def test_cases_cover_what_they_should() -> None:
    shapes = [case.shape for case in CASES.values()]
    assert {1, 7, 8, 41, 64, 65, 125, 300, 513} <= {s for _, s, _, _ in shapes}
    assert {1, 4, 12} <= {h for _, _, h, _ in shapes}
    assert {16, 64, 80, 128} <= {d for *_, d in shapes}
    for short in (True, False):
        kinds = [case for case in CASES.values() if (case.shape[1] <= 64) == short]
        for kind in ("extra", "lengths"):
            assert {getattr(case, kind) is None for case in kinds} == {True, False}
        settings = [dict(case.settings) for case in kinds]
        assert {"dropout_p" in given for given in settings} == {True, False}
        assert {given.get("padded_rows") for given in settings} == {None, "attend"}


@both
@pytest.mark.parametrize("wanted", [0, 1], ids=["qkv", "alibi_scale"])
def test_each_gradient_alone(case: Case, wanted: int, triton_device: torch.device) -> None:
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(case.inputs(triton_device))]
    assert_matches_eager(case, inputs)


@both
def test_slopes_without_a_scale(case: Case, triton_device: torch.device) -> None:
    qkv, _ = case.inputs(triton_device)
    assert_matches_eager(case, [qkv])
    # without slopes positions say nothing
    assert_bitwise_equal(
        case.op("triton", triton_device, slopes=None)(qkv),
        case.op("triton", triton_device, slopes=None, positions=None)(qkv),
    )


@both
def test_integer_and_float_widths_of_the_small_arguments(case: Case, triton_device: torch.device) -> None:
    qkv, scale = case.inputs(triton_device)
    given = {name: value.to(triton_device) for name, value in _small(case).items()}
    wide = {name: value.long() if name != "slopes" else value.double() for name, value in given.items()}
    narrow = values_and_gradients(case.op("triton", triton_device, **given), [qkv, scale])
    doubled = scale.detach().double().requires_grad_()
    for actual, expected in zip(
        values_and_gradients(case.op("triton", triton_device, **wide), [qkv, doubled]), narrow, strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, check_dtype=False)


def _small(case: Case) -> dict[str, Tensor]:
    n, s, h, _ = case.shape
    positions = torch.arange(s, dtype=torch.int32).expand(n, s) * 3 - 1
    return {
        "positions": positions.clamp_min(-1),
        "slopes": 0.5 ** torch.arange(1, h + 1),
        "lengths": torch.full((n,), s - 2, dtype=torch.int32),
    }


@both
def test_any_negative_position_is_an_extra_token(case: Case, triton_device: torch.device) -> None:
    qkv, scale = (x.detach() for x in case.inputs(triton_device))
    positions = _small(case)["positions"].to(triton_device)
    positions[:, 4] = -1
    expected = case.op("triton", triton_device, positions=positions)(qkv, scale)
    positions[:, 4] = -77
    assert_bitwise_equal(case.op("triton", triton_device, positions=positions)(qkv, scale), expected)
    reference = case.op("eager", triton_device, positions=positions)(qkv, scale)
    torch.testing.assert_close(expected, reference, rtol=1e-5, atol=1e-5)


@both
def test_lengths_beyond_the_tokens_pad_nothing(case: Case, triton_device: torch.device) -> None:
    qkv = case.inputs(triton_device)[0].detach()
    whole = case.op("triton", triton_device, lengths=None, positions=None, slopes=None)(qkv)
    for length in (case.shape[1], case.shape[1] + 7, 2**31 - 1):
        lengths = torch.full((case.shape[0],), length, device=triton_device)
        call = case.op("triton", triton_device, lengths=lengths, positions=None, slopes=None)
        assert_bitwise_equal(call(qkv), whole)


@both
@pytest.mark.parametrize("padded_rows", ["zero", "attend"])
def test_padding_never_changes_valid_rows(case: Case, padded_rows: str, triton_device: torch.device) -> None:
    """Not even NaN does; and its gradients are zero where nobody looks."""
    qkv, scale = case.inputs(triton_device)
    n, s, h, d = case.shape
    lengths = torch.full((n,), s - 4, dtype=torch.int32, device=triton_device)
    call = case.op("triton", triton_device, lengths=lengths, padded_rows=padded_rows)
    clean = values_and_gradients(call, [qkv, scale])
    dirty = qkv.detach().clone()
    dirty[:, s - 4 :] = float("nan")
    kept = slice(0, s - 4)
    if padded_rows == "attend":  # queries count, keys and values do not
        dirty[:, s - 4 :, 0] = qkv.detach()[:, s - 4 :, 0]
        kept = slice(0, s)
    padded = values_and_gradients(call, [dirty.requires_grad_(), scale])
    for actual, expected in zip(padded, clean, strict=True):
        assert_bitwise_equal(actual, expected)
    assert (clean[1][:, s - 4 :, 1:] == 0).all()
    if padded_rows == "zero":
        assert (clean[0][:, s - 4 :] == 0).all() and (clean[1][:, s - 4 :] == 0).all()
    assert (clean[0][:, kept] != 0).all()


@both
def test_shifting_all_positions_changes_nothing(case: Case, triton_device: torch.device) -> None:
    inputs = case.inputs(triton_device)
    positions = _small(case)["positions"].long().to(triton_device)
    expected = values_and_gradients(case.op("triton", triton_device, positions=positions), inputs)
    for shift in (5, 2**25, 2**40):  # beyond what fp32 counts, and beyond int32
        moved = torch.where(positions < 0, positions, positions + shift)
        actual = values_and_gradients(case.op("triton", triton_device, positions=moved), inputs)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_bitwise_equal(ours, theirs)


@both
def test_permuting_tokens_permutes_outputs(case: Case, triton_device: torch.device) -> None:
    qkv, scale = (x.detach() for x in case.inputs(triton_device))
    positions = _small(case)["positions"].to(triton_device)
    order = torch.randperm(case.shape[1]).to(triton_device)
    first = case.op("triton", triton_device, lengths=None, positions=positions)(qkv, scale)
    second = case.op("triton", triton_device, lengths=None, positions=positions[:, order])(
        qkv[:, order], scale
    )
    torch.testing.assert_close(second, first[:, order], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(second, first)


DROPOUTS = {
    "whole counters": Case(shape=(2, 16, 2, 16), settings=dropout(0.3)),
    "counters across rows": Case(shape=(2, 13, 2, 16), settings=dropout(0.3)),
    "tiles, whole counters": Case(shape=(1, 72, 1, 16), settings=dropout(0.3)),
    "tiles, counters across rows": Case(shape=(1, 67, 2, 16), settings=dropout(0.3)),
}


@pytest.mark.parametrize("case", DROPOUTS.values(), ids=DROPOUTS)
def test_drops_what_eager_drops(case: Case, triton_device: torch.device) -> None:
    """Equal scores; a column of values that is 1 at one key shows its probabilities, and so do gradients."""
    n, s, h, d = case.shape
    keep = keep_mask((n, h, s, s), 0.3, torch.device("cpu"), SEED) / (0.7 * s)
    shown = torch.linspace(0, s - 1, d).long()  # a token for each column
    qkv = torch.zeros(n, s, 3, h, d)
    qkv[:, shown, 2, :, torch.arange(d)] = 1
    leaf = qkv.to(triton_device).requires_grad_()
    out = case.op("triton", triton_device)(leaf)
    values = out.detach().view(n, s, h, d).transpose(1, 2).cpu()
    torch.testing.assert_close(values, keep[..., shown], rtol=1e-5, atol=0)
    dout = torch.zeros(n, s, h, d)
    dout[:, shown, :, torch.arange(d)] = 1
    (dqkv,) = torch.autograd.grad(out, leaf, dout.view(n, s, h * d).to(triton_device))
    gradients = dqkv[:, :, 2].transpose(1, 2).cpu()
    torch.testing.assert_close(gradients, keep[:, :, shown].transpose(2, 3), rtol=1e-5, atol=0)
    assert 0.2 < (keep == 0).double().mean() < 0.4


def test_a_seed_is_the_same_as_int_and_tensor(triton_device: torch.device) -> None:
    inputs = SHORT.inputs(triton_device)
    seed = torch.tensor(-5, device=triton_device)
    first = values_and_gradients(SHORT.op("triton", triton_device, dropout_p=0.3, seed=-5), inputs)
    again = values_and_gradients(SHORT.op("triton", triton_device, dropout_p=0.3, seed=seed), inputs)
    for actual, expected in zip(again, first, strict=True):
        assert_bitwise_equal(actual, expected)
    other = SHORT.op("triton", triton_device, dropout_p=0.3, seed=seed + 1)(*inputs)
    assert not torch.equal(other, first[0])


@both
def test_unseeded_dropout_follows_torchs_generator(case: Case, triton_device: torch.device) -> None:
    inputs = case.inputs(triton_device)

    def run() -> list[Tensor]:
        return values_and_gradients(case.op("triton", triton_device, dropout_p=0.4), inputs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    for actual, expected in zip(run(), first, strict=True):
        assert_bitwise_equal(actual, expected)
    assert not torch.equal(first[0], second[0])


@both
@pytest.mark.parametrize("settings", [{}, dict(dropout(0.3))], ids=["plain", "dropout"])
def test_repeats_bitwise_and_leaves_inputs_alone(
    case: Case, settings: dict[str, Any], triton_device: torch.device
) -> None:
    assert_repeats(case.op("triton", triton_device, **settings), case.inputs(triton_device))


@both
@pytest.mark.parametrize("settings", [{}, dict(ATTEND)], ids=["zero", "attend"])
def test_nothing_reads_uninitialised_memory(
    case: Case,
    settings: dict[str, Any],
    triton_device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    inputs, call = case.inputs(triton_device), case.op("triton", triton_device, **settings)
    expected = values_and_gradients(call, inputs)
    request.getfixturevalue("poisoned_empty")
    for actual, clean in zip(values_and_gradients(call, inputs), expected, strict=True):
        assert_bitwise_equal(actual, clean)


@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 16), (3, 0, 2, 16), (3, 5, 0, 16)], ids=["no sequences", "no tokens", "no heads"]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_zero_size(shape: tuple[int, ...], dropout_p: float, triton_device: torch.device) -> None:
    n, s, h, d = shape
    case = Case(shape=(n, s, h, d), extra=0, lengths=(0,) * n)
    inputs = case.inputs(triton_device)
    out, dqkv, dscale = values_and_gradients(case.op("triton", triton_device, dropout_p=dropout_p), inputs)
    assert out.shape == (n, s, h * d) and dqkv.shape == (n, s, 3, h, d)
    assert dscale.tolist() == [0.0] * h


# name -> (make it from [N,S,3,H,Dh], whether it is read in place)
VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "contiguous": (lambda x: x, True),
    "tokens first": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), True),
    "heads before slots": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), True),
    "part of a wider head": (lambda x: torch.cat([x, x], 4)[..., : x.shape[4]], True),
    "one sequence repeated": (lambda x: x[:1].expand(x.shape), True),
    "every second value": (lambda x: torch.stack([x, x + 1], 5)[..., 0], False),
}


@both
@pytest.mark.parametrize(("view", "in_place"), VIEWS.values(), ids=VIEWS)
def test_strides(
    case: Case,
    view: Callable[[Tensor], Tensor],
    in_place: bool,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qkv, scale = case.inputs(triton_device)
    qkv = view(qkv.detach())
    expected = values_and_gradients(
        case.op("triton", triton_device), [qkv.contiguous().requires_grad_(), scale]
    )
    copies: list[Tensor] = []
    contiguous = Tensor.contiguous

    def counted(self: Tensor, *args: Any) -> Tensor:
        if self.dim() == 5:
            copies.append(self)
        return contiguous(self, *args)

    monkeypatch.setattr(Tensor, "contiguous", counted)
    actual = values_and_gradients(case.op("triton", triton_device), [qkv.requires_grad_(), scale])
    assert len(copies) == (0 if in_place else 2)  # forward and backward
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise_equal(ours, theirs)


@both
def test_strides_of_gradients_and_small_arguments(case: Case, triton_device: torch.device) -> None:
    qkv, scale = case.inputs(triton_device)
    small = {name: value.to(triton_device) for name, value in _small(case).items()}
    expected = values_and_gradients(case.op("triton", triton_device, **small), [qkv, scale])
    doubled = {name: torch.stack([value, value + 1], -1)[..., 0] for name, value in small.items()}
    wide = torch.stack([scale.detach(), scale.detach() + 1], 1)[:, 0].requires_grad_()
    again = values_and_gradients(case.op("triton", triton_device, **doubled), [qkv, wide])
    for actual, clean in zip(again, expected, strict=True):
        assert_bitwise_equal(actual, clean)
    repeated = small | {"positions": small["positions"][:1].expand(case.shape[:2])}
    once = small | {"positions": small["positions"][:1].repeat(case.shape[0], 1)}
    assert_bitwise_equal(
        case.op("triton", triton_device, **repeated)(qkv, scale),
        case.op("triton", triton_device, **once)(qkv, scale),
    )
    out = case.op("triton", triton_device)(qkv, scale)
    gradients = [torch.ones((), device=triton_device).expand(out.shape)]  # strides are all zero
    gradients += [torch.ones_like(out), spread(torch.ones_like(out)), torch.ones_like(out).repeat(1, 2, 1)]
    gradients[-1] = gradients[-1][:, ::2]
    first, *others = (
        torch.autograd.grad(out, [qkv, scale], gradient, retain_graph=True) for gradient in gradients
    )
    for other in others:
        for actual, clean in zip(other, first, strict=True):
            assert_bitwise_equal(actual, clean)


@both
def test_rows_further_apart_than_int32_counts(case: Case, triton_device: torch.device) -> None:
    """In a buffer of 4 GiB of which a few pages are touched."""
    _, s, h, d = case.shape
    stride = 2**31 // (s - 2) // 8 * 8
    assert (s - 1) * stride > 2**31
    half = Case(shape=(1, s, h, d))
    values, gradients = (torch.randn(1, s, width * h * d).half().to(triton_device) for width in (3, 1))
    buffer = torch.empty((s - 1) * stride + 3 * h * d, dtype=torch.float16, device=triton_device)
    far = buffer.as_strided((1, s, 3, h, d), (1, stride, h * d, d, 1)).copy_(values.view(1, s, 3, h, d))
    call = half.op("triton", triton_device)

    def run(qkv: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.detach().requires_grad_()
        out = call(qkv)
        return out.detach(), torch.autograd.grad(out, qkv, dout)[0]

    expected = run(values.view(1, s, 3, h, d), gradients)
    for actual, near in zip(run(far, gradients), expected, strict=True):
        assert_bitwise_equal(actual, near)
    wide = buffer.as_strided((1, s, h * d), (1, stride, 1)).copy_(gradients)
    for actual, near in zip(run(values.view(1, s, 3, h, d), wide), expected, strict=True):
        assert_bitwise_equal(actual, near)


def test_refusals(triton_device: torch.device) -> None:
    qkv = torch.zeros(2, 3, 3, 1, 16, device=triton_device)

    def call(x: Tensor) -> Tensor:
        return multimask_attention(x, backend="triton")

    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        call(qkv.double())
    with pytest.raises(BackendError, match="head widths up to 128 only, got 129"):
        call(torch.zeros(2, 3, 3, 1, 129, device=triton_device))
    if triton_device.type == "cpu":
        with pytest.raises(BackendError, match="Triton's interpreter is wrong in bf16"):
            call(qkv.bfloat16())
