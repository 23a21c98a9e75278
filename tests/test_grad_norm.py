"""grad_norm: against fp64 and torch's own, on eager and compiled; what it takes and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import d2vkern
from d2vkern import _check_mode, _native
from d2vkern._nvtx import force_ranges, tally_costs
from d2vkern.testing import assert_bitwise_equal, backend_spy

CHUNK = 65536
"""elements that csrc/grad_norm.cpp sums in one go"""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {
    "scalar": ((),),
    "one element": ((1,),),
    "nothing and some": ((0, 3), (2,)),
    "less than a line": ((15,),),
    "prime": ((61, 17),),
    "around a chunk": ((CHUNK - 1,), (CHUNK,), (CHUNK + 1,)),
    "a model": ((768, 3, 4, 4), (768,), (), (2304, 768), (2304,)),
}
BACKENDS = [
    "eager",
    pytest.param("native", marks=pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())),
]
op = None if _native.problem() else torch.ops.d2vkern_native.l2_norm


def exact(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads]).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: torch.dtype, backend: str) -> None:
    grads = [torch.randn(shape).to(dtype) for shape in SIZES[name]]
    before = [g.clone() for g in grads]
    with backend_spy() as calls:
        norm = d2vkern.grad_norm(grads, backend=backend)
    assert calls == [("adamw_ema", backend)] and norm.shape == () and norm.dtype == torch.float32
    rtol = 1e-7 if backend == "native" else 1e-6
    torch.testing.assert_close(norm.double(), exact(grads), rtol=rtol, atol=0)
    for g, original in zip(grads, before, strict=True):
        assert_bitwise_equal(g, original)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_tensor_keeps_its_digits(backend: str) -> None:
    """PyTorch's own norm of it has four."""
    grads = [torch.randn(24_000_000) * 1e-3, torch.randn(100)]
    norm = d2vkern.grad_norm(grads, backend=backend)
    torch.testing.assert_close(norm.double(), exact(grads), rtol=1e-6, atol=0)


def test_auto_is_the_compiled_one() -> None:
    grads = [torch.randn(40, 30), torch.randn(7)]
    torch.testing.assert_close(d2vkern.grad_norm(grads, backend="eager"), nn.utils.get_total_norm(grads))
    with backend_spy() as calls:
        d2vkern.grad_norm(tuple(grads))
    assert calls == [("adamw_ema", "eager" if _native.problem() else "native")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_layouts(backend: str) -> None:
    base = torch.randn(6, 8, 5, 7)
    grads = [
        base.contiguous(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2).half(),
        base[:, ::2],
        base[0, 0, 0, :1].expand(9),
        base.bfloat16()[1:, :, 2:],
    ]
    norm = d2vkern.grad_norm(grads, backend=backend)
    torch.testing.assert_close(norm.double(), exact(grads), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 16, 70_001])
def test_what_is_not_finite_shows(place: int, value: float, backend: str) -> None:
    grads = [torch.ones(5), torch.ones(70_002)]
    grads[1][place] = value
    norm = d2vkern.grad_norm(grads, backend=backend)
    assert norm.isnan() if value != value else norm == float("inf")


@pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_compiled_one_neither_overflows_nor_underflows(scale: float) -> None:
    grads = [torch.full((300,), 3 * scale), torch.full((300,), 4 * scale)]
    norm = d2vkern.grad_norm(grads, backend="native")
    assert float(norm) == pytest.approx(5 * 300**0.5 * scale, rel=1e-6)


@pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())
def test_threads_and_instruction_sets_change_no_bit() -> None:
    from .native_common import LEVELS, cpu_level, threads

    grads = [torch.randn(n).to(DTYPES[i % 3]) for i, n in enumerate((3 * CHUNK + 5, 77, CHUNK, 40_000))]
    norms = []
    for count in (1, 2):
        for level in LEVELS:
            with threads(count), cpu_level(level):
                norms.append(d2vkern.grad_norm(grads, backend="native"))
    for norm in norms[1:]:
        assert_bitwise_equal(norm, norms[0])


def test_fp64_stays_fp64() -> None:
    grads = [torch.randn(9, dtype=torch.float64), torch.randn(9)]
    norm = d2vkern.grad_norm(grads)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, exact(grads), rtol=1e-7, atol=0)
    with pytest.raises(d2vkern.BackendError, match="fp64 tensors run on eager only"):
        d2vkern.grad_norm(grads, backend="native")


def test_no_gradients_and_whole_numbers() -> None:
    assert d2vkern.grad_norm([]) == 0
    with pytest.raises(TypeError, match=r"grad_norm: grads\[1\] must have dtype .*, got int64"):
        d2vkern.grad_norm([torch.ones(2), torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_range_work_and_checks(backend: str) -> None:
    grads = [torch.ones(6), torch.ones(3).half()]
    with force_ranges(True), tally_costs() as tallies, _check_mode.force_checks(True):
        norm = d2vkern.grad_norm(grads, backend=backend)
    assert float(norm) == 3.0
    assert tallies[f"grad_norm/fwd/{backend}"].bytes == 30


@pytest.mark.skipif(bool(_native.problem()), reason=_native.problem())
def test_the_registered_op() -> None:
    assert op is not None
    torch.library.opcheck(op.default, ([torch.randn(7), torch.randn(3).half()],))
    with pytest.raises(ValueError, match="must be fp32, fp16 or bf16"):
        op([torch.ones(2, dtype=torch.float64)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph(backend: str) -> None:
    grads = [torch.randn(7, 3), torch.randn(3)]
    torch._dynamo.reset()
    compiled = torch.compile(d2vkern.grad_norm, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(grads, backend=backend), d2vkern.grad_norm(grads, backend=backend))


def test_clipping_as_torch_does() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(30, 40) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model(torch.randn(5, 30, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)
    grads = [p.grad for p in models[1].parameters() if p.grad is not None]
    norm = d2vkern.grad_norm(grads)
    torch.testing.assert_close(norm, expected)
    factor = (0.5 / (norm + 1e-6)).clamp(max=1.0)
    for ours, p in zip(grads, models[0].parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(ours * factor, p.grad)
