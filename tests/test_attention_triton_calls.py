"""Triton multimask_attention in its surroundings: launches, ranges, registration, compile, goldens, GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from d2vkern import multimask_attention, use_backend  # noqa: E402
from d2vkern._nvtx import force_ranges, tally_costs  # noqa: E402
from d2vkern.kernels._launch import record_launches  # noqa: E402
from d2vkern.kernels._tuning import forced, record_choices  # noqa: E402
from d2vkern.reference._dropout import keep_mask  # noqa: E402
from d2vkern.testing import assert_bitwise_equal, backend_spy  # noqa: E402

from .attention_cases import SEED, Case, assert_matches_eager, dropout, in_few_programs  # noqa: E402, F401
from .d2v.golden_cases import load  # noqa: E402
from .op_checks import assert_follows_autocast, values_and_gradients  # noqa: E402

SHORT = Case(shape=(2, 11, 2, 16), extra=1, lengths=(5, 0))
LONG = Case(shape=(1, 67, 1, 16), extra=1, lengths=(65,))
fast = pytest.mark.usefixtures("in_few_programs")
both = pytest.mark.parametrize("case", [SHORT, LONG], ids=["one tile", "tiles"])
FORWARD = {True: ["attention_fwd_kernel_short"], False: ["attention_fwd_kernel"]}
QUERIES, KEYS = "attention_bwd_kernel_queries", "attention_bwd_kernel_keys"
BACKWARD = {True: ["attention_bwd_kernel_short"], False: [QUERIES, KEYS]}


@fast
@both
def test_launches(case: Case, triton_device: torch.device) -> None:
    qkv, scale = case.inputs(triton_device, torch.float16)
    call, short = case.op("triton", triton_device), case is SHORT
    with record_launches() as forward:
        out = call(qkv, scale)
    with record_launches() as backward:
        torch.autograd.grad(out.sum(), [qkv, scale])
    with record_launches() as without_scale:
        call(qkv, scale.detach()).sum().backward()
    with record_launches() as scale_alone:
        call(qkv.detach(), scale).sum().backward()
    with record_launches() as inference, torch.no_grad():
        call(qkv, scale)
    names = [
        [launch.kernel.__name__ for launch in launches]
        for launches in (forward, backward, without_scale, scale_alone, inference)
    ]
    assert names == [
        FORWARD[short],
        [*BACKWARD[short], "column_sums_kernel"],
        [*FORWARD[short], *BACKWARD[short]],
        [*FORWARD[short], BACKWARD[short][0], "column_sums_kernel"],
        FORWARD[short],
    ]
    n, s, h, _ = case.shape
    tiles = 1 if short else -(-s // forward[0].constexprs["BLOCK_M"])
    assert forward[0].grid == inference[0].grid == (n * h * tiles,)
    if not short:  # what the softmax was divided by is written for backward alone
        assert (forward[0].args[1] is None, inference[0].args[1] is None) == (False, True)


@fast
@both
def test_ranges(case: Case, triton_device: torch.device) -> None:
    inputs = case.inputs(triton_device)
    with force_ranges(True), tally_costs() as tallies:
        values_and_gradients(case.op("triton", triton_device), inputs)
        values_and_gradients(case.op("triton", triton_device, dropout_p=0.1), inputs)
    n, s, h, d = case.shape
    tensor, places, flops = n * s * h * d * 4, 4 * n * s, 4 * n * s * s * h * d
    found = {name: (tally.calls, tally.bytes, tally.flops) for name, tally in tallies.items()}
    assert found == {
        "attention/fwd/triton": (2, 2 * (4 * tensor + places), 2 * flops),
        "attention/bwd/triton": (2, 2 * (8 * tensor + places), 4 * flops),
    }


@fast
@both
def test_what_is_kept_for_backward(case: Case, triton_device: torch.device) -> None:
    """qkv and the small arguments; of several tiles the output and a number per query too."""
    held: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        held.append(x)
        return x

    qkv, scale = case.inputs(triton_device, torch.float16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = case.op("triton", triton_device)(qkv, scale)
    n, s, h, _ = case.shape
    large = sorted(x.numel() for x in held if x.is_floating_point() and x.numel() > h)
    expected = [qkv.numel()] if case is SHORT else [qkv.numel(), out.numel(), n * h * s]
    assert large == sorted(expected)


OPTIONS = {"plain": 0.0, "dropout": 0.3}


@fast
@both
@pytest.mark.parametrize("p", OPTIONS.values(), ids=OPTIONS)
def test_opcheck(case: Case, p: float, triton_device: torch.device) -> None:
    n, s, h, _ = shape = (2, 5 if case is SHORT else 65, 1, 16)
    qkv, scale = (x.detach() for x in Case(shape=shape, extra=1).inputs(triton_device))
    qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    positions = torch.arange(s, device=triton_device).expand(n, s).contiguous()
    slopes, lengths = (torch.ones(size, device=triton_device) for size in (h, n))
    seed = torch.tensor(3, device=triton_device) if p else None
    given = (positions, slopes, scale, lengths.int(), seed, None if p else 0.2, p, p > 0)
    for save in (True, False)[: 1 + (p == 0)]:
        torch.library.opcheck(torch.ops.d2vkern.attention_fwd.default, (qkv, *given, save))
    out, lse = torch.ops.d2vkern.attention_fwd(qkv, *given, True)
    for needs in ([True, True], [True, False], [False, True])[: 1 + 2 * (p == 0)]:
        backward = (out.cos(), qkv, out, lse, *given, needs)
        torch.library.opcheck(torch.ops.d2vkern.attention_bwd.default, backward)


@fast
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("case", "tokens"), [(SHORT, (11, 13)), (LONG, (67, 70))], ids=["one tile", "tiles"])
def test_compiles(case: Case, tokens: tuple[int, int], dynamic: bool, triton_device: torch.device) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def run(qkv: Tensor, scale: Tensor, positions: Tensor) -> Tensor:
        return multimask_attention(
            qkv,
            positions=positions,
            slopes=torch.ones_like(scale.detach()) * 0.1,
            alibi_scale=scale,
            dropout_p=0.3,
            seed=5,
            backend="triton",
        )

    compiled = torch.compile(run, fullgraph=True, backend=graphs, dynamic=dynamic)
    compiled_after = set()
    for size in tokens if dynamic else tokens[:1]:
        n, _, h, d = case.shape
        inputs = Case(shape=(n, size, h, d), extra=1).inputs(triton_device)
        inputs.append(torch.arange(-1, size - 1, device=triton_device).expand(n, -1).contiguous())
        expected = values_and_gradients(run, inputs)
        for ours, theirs in zip(values_and_gradients(compiled, inputs), expected, strict=True):
            assert_bitwise_equal(ours, theirs)
        compiled_after.add(graphs.frame_count)
    assert len(compiled_after) == 1
    with torch.no_grad():
        assert_bitwise_equal(compiled(*inputs), expected[0])
    torch._dynamo.reset()


@fast
@both
def test_follows_autocast(case: Case, triton_device: torch.device) -> None:
    assert_follows_autocast(case.op("triton", triton_device), case.inputs(triton_device))


@fast
@both
@pytest.mark.parametrize("seed", [None, 5], ids=["drawn", "given"])
def test_checkpointing_repeats_the_same_dropout(
    case: Case, seed: int | None, triton_device: torch.device
) -> None:
    inputs, call = case.inputs(triton_device), case.op("triton", triton_device, dropout_p=0.4, seed=seed)
    torch.manual_seed(1)
    expected = values_and_gradients(call, inputs)
    torch.manual_seed(1)
    actual = values_and_gradients(lambda *v: checkpoint(call, *v, use_reentrant=False), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bitwise_equal(ours, theirs)


# case, dtype: the kernels that a GPU would run
TUNED: dict[str, tuple[Case, torch.dtype]] = {
    "one tile of 16": (SHORT, torch.float16),
    "one tile of 32": (Case(shape=(1, 20, 1, 16), extra=0), torch.float16),
    "tiles": (LONG, torch.float16),
    "fp32": (Case(shape=(1, 20, 1, 16), extra=1), torch.float32),
}


@pytest.mark.parametrize(("case", "dtype"), TUNED.values(), ids=TUNED)
def test_every_candidate_of_the_tuner_gives_the_same(
    case: Case, dtype: torch.dtype, triton_device: torch.device
) -> None:
    inputs, call = case.inputs(triton_device, dtype), case.op("triton", triton_device)
    with record_choices() as choices:
        expected = values_and_gradients(call, inputs)
    short = case.shape[1] <= 64 and dtype == torch.float16
    assert {kernel for kernel, _ in choices} == {*FORWARD[short], *BACKWARD[short]}
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for (kernel, bucket), candidates in choices.items():
        tiles = {tuple(v for k, v in c.items() if k.startswith("BLOCK")): c for c in candidates}
        for config in list(tiles.values())[1:]:
            with forced(kernel, bucket, config):
                actual = values_and_gradients(call, inputs)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@fast
@pytest.mark.parametrize("name", ["audio_base", "audio_padded"])
def test_the_originals_numbers(name: str, goldens: Path, triton_device: torch.device) -> None:
    """Student, loss and gradients of a whole speech model whose attention alone runs here.

    Tolerances and their reasons are those of tests/d2v/test_parity.py.
    """
    case = load(goldens, name)
    model = case.model().to(triton_device)
    inputs = {k: None if v is None else v.to(triton_device) for k, v in case.inputs().items()}
    with use_backend("eager", attention="triton"), backend_spy() as calls:
        out = model(**inputs)
        out.loss.backward()
    assert {backend for stem, backend in calls if stem == "attention"} == {"triton"}
    scalars = case.facts["scalars"]
    assert out.loss.item() == pytest.approx(scalars["total_loss"], rel=1e-5)
    named = dict(model.named_parameters())
    for key, expected in case.tensors.items():
        if key.startswith("grad."):
            actual = named[key.removeprefix("grad.")].grad.cpu()
            tolerance = 1e-4 if key.endswith("alibi_scale") else 1e-5
            assert (actual - expected).norm() <= tolerance * expected.norm(), key


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("tokens", [8, 31, 41, 64, 65, 267, 300, 513])
@pytest.mark.parametrize("p", OPTIONS.values(), ids=OPTIONS)
def test_bf16_matches_eager(tokens: int, width: int, p: float, triton_device: torch.device) -> None:
    settings = dropout(p) if p else ()
    lengths = (tokens, max(1, tokens - 3), 1, 0, tokens)
    for padded_rows in ("zero", "attend"):
        case = Case(shape=(5, tokens, 4, width), extra=1, lengths=lengths, settings=settings)
        inputs = case.inputs(triton_device, torch.bfloat16)
        assert_matches_eager(case, inputs, padded_rows=padded_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [50, 700])
def test_offsets_beyond_two_to_the_31(tokens: int, triton_device: torch.device) -> None:
    """Of qkv and of dropout's elements: the last sequences as if they stood alone."""
    h, d, p = 12, 64, 0.3
    n = 2**31 // (tokens * 3 * h * d) + 3
    case = Case(shape=(n, tokens, h, d))
    qkv = torch.randn(n, tokens, 3, h, d, device=triton_device, dtype=torch.bfloat16).requires_grad_()
    dout = torch.randn(n, tokens, h * d, device=triton_device, dtype=torch.bfloat16)
    out = case.op("triton", triton_device)(qkv)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    last = qkv.detach()[-2:].clone().requires_grad_()
    alone = case.op("triton", triton_device)(last)
    assert_bitwise_equal(out.detach()[-2:], alone.detach())
    assert_bitwise_equal(dqkv[-2:], torch.autograd.grad(alone, last, dout[-2:])[0])
    dropped = case.op("triton", triton_device, dropout_p=p, seed=SEED)(qkv).detach()[-1]
    q, k, v = last.detach()[1].float().permute(1, 2, 0, 3)
    keep = keep_mask((h, tokens, tokens), p, triton_device, SEED, first=(n - 1) * h * tokens * tokens)
    expected = (q @ k.transpose(1, 2) * d**-0.5).softmax(-1) * keep / (1 - p) @ v
    expected = expected.transpose(0, 1).reshape(tokens, h * d)
    torch.testing.assert_close(dropped.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [41, 300])
def test_a_replayed_graph_draws_anew(tokens: int, triton_device: torch.device) -> None:
    case = Case(shape=(8, tokens, 12, 64), extra=1)
    inputs = case.inputs(triton_device, torch.bfloat16)
    seed = torch.tensor(3, device=triton_device)
    call = case.op("triton", triton_device, dropout_p=0.3, seed=seed)

    def step() -> list[Tensor]:
        out = call(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, out.detach())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    results = []
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        results.append([x.clone() for x in captured])
        for actual, expected in zip(captured, step(), strict=True):
            assert_bitwise_equal(actual, expected)
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.gpu
def test_an_unseeded_graph_draws_anew(triton_device: torch.device) -> None:
    case = Case(shape=(4, 41, 4, 64))
    (qkv,) = (x.detach() for x in case.inputs(triton_device, torch.bfloat16))
    call = case.op("triton", triton_device, dropout_p=0.3)
    call(qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(qkv)
    seen: list[Any] = []
    for _ in range(2):
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(*seen)
