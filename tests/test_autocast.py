"""Every public op under torch.autocast, beside the same sequence of torch's own operators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import d2vkern
from d2vkern.testing import assert_bitwise_equal

from .op_checks import leaf, values_and_gradients

PLAN = d2vkern.random_mask(torch.arange(2), 3, 11, prob=0.4)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dataclass(frozen=True)
class Case:
    """An op and torch's own way, of inputs of these shapes; those named in `low` come in autocast's dtype,
    `constants` want no gradient."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    low: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()


def _attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _normed_conv(
    conv: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, **how: int
) -> Tensor:
    out = conv(x.movedim(-1, 1), weight, bias, **how).movedim(1, -1)
    return F.layer_norm(out, out.shape[-1:])


def _stem(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out = F.conv1d(x.transpose(1, 2), weight, stride=2).transpose(1, 2)
    return F.gelu(F.layer_norm(out, out.shape[-1:], scale, shift))


def _gather(x: Tensor, extra: Tensor, positions: Tensor, per_mask: Tensor) -> Tensor:
    every = (x + positions).repeat_interleave(3, 0) + per_mask
    kept = every.gather(1, PLAN.ids_keep.long().unsqueeze(2).expand(-1, -1, x.shape[2]))
    return torch.cat([extra.expand(len(kept), -1, -1), kept], 1)


def _scatter(x: Tensor) -> Tensor:
    out = x.new_zeros(*PLAN.mask.shape, x.shape[2])
    return out.scatter(1, PLAN.ids_keep.long().unsqueeze(2).expand_as(x), x)


def _loss(pred: Tensor, target: Tensor) -> Tensor:
    every = target.detach().repeat_interleave(3, 0)
    return F.mse_loss(pred[PLAN.mask], every[PLAN.mask], reduction="sum")


def _norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + update, x.shape[-1:], weight, bias)


NORM = (2, 11, 8), (2, 11, 8), (8,), (8,)
GATHER = (2, 11, 8), (1, 8), (11, 8), (6, 11, 8)
CASES = {
    "linear": Case(d2vkern.linear, F.linear, ((2, 11, 8), (6, 8), (6,))),
    "linear of low": Case(d2vkern.linear, F.linear, ((2, 11, 8), (6, 8), (6,)), low=(0,)),
    "linear, low weights": Case(d2vkern.linear, F.linear, ((2, 11, 8), (6, 8), (6,)), low=(1, 2)),
    "gelu_mlp": Case(
        d2vkern.gelu_mlp,
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        ((2, 11, 8), (16, 8), (16,), (8, 16), (8,)),
    ),
    "conv_stem": Case(
        lambda x, w, scale, shift: d2vkern.conv_stem(x, w, 2, scale, shift),
        _stem,
        ((2, 11, 4), (8, 4, 3), (8,), (8,)),
    ),
    "conv_block_1d": Case(
        lambda x, w, b: d2vkern.conv_block_1d(x, w, b, groups=2),
        lambda x, w, b: F.gelu(_normed_conv(F.conv1d, x, w, b, padding=1, groups=2)),
        ((2, 11, 8), (8, 4, 3), (8,)),
    ),
    "conv_block_2d": Case(
        lambda x, w: d2vkern.conv_block_2d(x, w, residual=True),
        lambda x, w: x + F.gelu(_normed_conv(F.conv2d, x, w, None, padding=1)),
        ((2, 5, 4, 8), (8, 8, 3, 3)),
        low=(0,),
    ),
    "multimask_attention": Case(d2vkern.multimask_attention, _attention, ((4, 11, 3, 2, 8),)),
    "residual_norm": Case(d2vkern.residual_norm, _norm, NORM),
    "residual_norm, low update": Case(d2vkern.residual_norm, _norm, NORM, low=(1,)),
    "residual_norm, low x": Case(d2vkern.residual_norm, _norm, NORM, low=(0,)),
    "residual_norm of low": Case(d2vkern.residual_norm, _norm, NORM, low=(0, 1)),
    "gather_tokens": Case(lambda x, *rest: d2vkern.gather_tokens(x, PLAN, *rest), _gather, GATHER),
    "gather_tokens, low x": Case(
        lambda x, *rest: d2vkern.gather_tokens(x, PLAN, *rest), _gather, GATHER, low=(0, 3)
    ),
    "gather_tokens of low": Case(
        lambda x, *rest: d2vkern.gather_tokens(x, PLAN, *rest), _gather, GATHER, low=(0, 1, 2, 3)
    ),
    "scatter_tokens of low": Case(
        lambda x: d2vkern.scatter_tokens(x, PLAN, 0.0, 0), _scatter, ((6, PLAN.kept, 8),), low=(0,)
    ),
    "masked_regression_loss": Case(
        lambda p, t: d2vkern.masked_regression_loss(p, t, PLAN, scale=1.0).loss,
        _loss,
        ((6, 11, 8), (2, 11, 8)),
        low=(0,),
        constants=(1,),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def _inputs(case: Case, dtype: torch.dtype, others: torch.dtype = torch.float32) -> list[Tensor]:
    made = [leaf(*shape, dtype=others, scale=0.5).detach() for shape in case.shapes]
    cast = [x.to(dtype) if i in case.low else x for i, x in enumerate(made)]
    return [x.requires_grad_(i not in case.constants) for i, x in enumerate(cast)]


def _under_autocast(run: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    with torch.autocast("cpu", dtype):
        return values_and_gradients(run, inputs)


@dtypes
@cases
def test_is_torchs(name: str, dtype: torch.dtype) -> None:
    """Dtypes of the output and of all gradients, and values but for the last bits of `dtype`."""
    case = CASES[name]
    inputs = _inputs(case, dtype)
    ours, theirs = (_under_autocast(run, inputs, dtype) for run in (case.ours, case.torchs))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    digits = 16 * torch.finfo(dtype).eps
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=digits, atol=digits * float(expected.abs().max()))


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """On machines without a GPU too, where torch.autocast("cuda") would do nothing."""
    torch.set_autocast_enabled("cuda", True)
    outer = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode(), d2vkern.use_backend("eager"):
        yield
    torch.set_autocast_dtype("cuda", outer)
    torch.set_autocast_enabled("cuda", False)


# torch without CUDA cannot slice fake CUDA tensors, as eager convolutions and attention do
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("linear", "gelu_mlp", "residual_norm"))])
@pytest.mark.usefixtures("cuda_autocast")
def test_dtype_is_torchs_on_cuda(name: str) -> None:
    """There norms are fp32."""
    case = CASES[name]
    low = [torch.bfloat16 if i in case.low else torch.float32 for i in range(len(case.shapes))]
    inputs = [
        torch.empty(size, dtype=dtype, device="cuda") for size, dtype in zip(case.shapes, low, strict=True)
    ]
    assert case.ours(*inputs).dtype == case.torchs(*inputs).dtype


def test_targets_are_fp32_whatever_autocast_says() -> None:
    layer = torch.randn(2, 11, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(d2vkern.layer_targets([layer], "layer"), d2vkern.layer_targets([layer], "layer"))


@dtypes
@pytest.mark.parametrize("name", ["gelu_mlp", "conv_block_1d", "residual_norm, low update"])
def test_checkpointing_casts_again(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = _inputs(case, dtype)
    expected = _under_autocast(case.ours, inputs, dtype)
    actual = _under_autocast(lambda *v: checkpoint(case.ours, *v, use_reentrant=False), inputs, dtype)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise_equal(ours, theirs)


@cases
def test_fp64_is_left_alone(name: str) -> None:
    case = CASES[name]
    inputs = _inputs(case, torch.float64, torch.float64)
    for ours, theirs in zip(
        _under_autocast(case.ours, inputs, torch.bfloat16),
        values_and_gradients(case.ours, inputs),
        strict=True,
    ):
        assert_bitwise_equal(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "gather_tokens, low x", "residual_norm, low x"])
def test_a_disabled_block_casts_nothing(name: str) -> None:
    case = CASES[name]
    inputs = _inputs(case, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        if case.low:
            with pytest.raises(TypeError, match="must have dtype"):
                case.ours(*inputs)
        else:
            assert case.ours(*inputs).dtype == torch.float32
