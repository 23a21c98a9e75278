"""Triton residual_norm as a citizen: launches, costs, torch.library, torch.compile, autocast, refusals."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("triton")

from d2vkern import BackendError  # noqa: E402
from d2vkern._nvtx import force_ranges, tally_costs  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402
from d2vkern.testing import assert_bitwise_equal  # noqa: E402

from .op_checks import values_and_gradients  # noqa: E402
from .test_residual_norm_triton import make_case, op  # noqa: E402


def test_launches(triton_device: torch.device) -> None:
    inputs = make_case((3, 40, 8), triton_device)
    with record_launches() as forward:
        out = op("triton")(*inputs)
    with record_launches() as backward:
        out.sum().backward()
    with record_launches() as without_vectors:
        op("triton")(*inputs[:2]).sum().backward()
    with record_launches() as inference, torch.no_grad():
        op("triton")(*inputs)
    names = [
        [launch.kernel.__name__ for launch in launches]
        for launches in (forward, backward, without_vectors, inference)
    ]
    forward_kernel, rows = "residual_norm_fwd_kernel", "residual_norm_bwd_kernel_rows"
    assert names == [[forward_kernel], [rows, "column_sums_kernel"], [forward_kernel, rows], [forward_kernel]]
    # z, mean and rstd are made for backward alone
    assert [launch.args[8:11] == (None,) * 3 for launch in (*forward, *inference)] == [False, True]


def test_ranges(triton_device: torch.device) -> None:
    inputs = make_case((3, 4, 8), triton_device)
    with force_ranges(True), tally_costs() as tallies:
        values_and_gradients(op("triton"), inputs[:5])
        values_and_gradients(op("triton", dropout_p=0.1), inputs[:5])
        values_and_gradients(op("triton", prenorm=True), inputs)
    tensor, vectors = 3 * 4 * 8 * 4, 3 * 8 * 4
    found = {name: (tally.calls, tally.bytes, tally.flops) for name, tally in tallies.items()}
    assert found == {
        "residual_norm/fwd/triton": (3, 3 * (4 * tensor + vectors) + 8 * 4, 0),
        # dy, z, dx; with dropout dupdate; with gamma dupdate, update and with prenorm dsum
        "residual_norm/bwd/triton": (3, (3 + 4 + 6) * tensor + 6 * vectors + 2 * 8 * 4, 0),
    }


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(p: float, save: bool, triton_device: torch.device) -> None:
    x, update, *vectors = (v.detach() for v in make_case((2, 5, 8), triton_device))
    seed = torch.tensor(3, device=triton_device) if p else None
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    prenorm = bool(p)
    forward = (x, update.half(), *vectors, seed, prenorm, 1e-5, p, p, save)
    torch.library.opcheck(torch.ops.d2vkern.residual_norm_fwd.default, forward)
    if save:
        y, *saved = torch.ops.d2vkern.residual_norm_fwd(*forward)
        for needs in ([True] * 6, [False, True, False, False, True, False]):
            dsum = y if prenorm else None
            backward = (y, dsum, update.half(), *saved, *vectors, seed, torch.float16, p, p, needs)
            torch.library.opcheck(torch.ops.d2vkern.residual_norm_bwd.default, backward)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("settings", [{}, {"dropout_p": 0.3, "seed": 3}], ids=["plain", "dropout"])
def test_compiles(dynamic: bool, settings: dict[str, Any], triton_device: torch.device) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op("triton", **settings), fullgraph=True, backend=graphs, dynamic=dynamic)
    compiled_after = set()
    for tokens in (5, 11) if dynamic else (5,):
        inputs = make_case((3, tokens, 8), triton_device)
        expected = values_and_gradients(op("triton", **settings), inputs)
        for ours, theirs in zip(values_and_gradients(compiled, inputs), expected, strict=True):
            assert_bitwise_equal(ours, theirs)
        compiled_after.add(graphs.frame_count)
    assert len(compiled_after) == 1
    with torch.no_grad():
        assert_bitwise_equal(compiled(*inputs), expected[0])
    torch._dynamo.reset()


def test_autocast_changes_nothing(triton_device: torch.device) -> None:
    inputs = make_case((3, 5, 8), triton_device)
    expected = values_and_gradients(op("triton"), inputs)
    with torch.autocast(triton_device.type, torch.bfloat16):
        actual = values_and_gradients(op("triton"), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise_equal(ours, theirs)


def test_refusals(triton_device: torch.device) -> None:
    x = torch.zeros(2, 3, 8, device=triton_device)
    with pytest.raises(BackendError, match="fp64 tensors run on eager only"):
        op("triton")(x.double(), x.double())
    if triton_device.type == "cpu":
        with pytest.raises(BackendError, match="Triton's interpreter is wrong in bf16"):
            op("triton")(x.bfloat16(), x.bfloat16())
