"""Other people's attention behind multimask_attention: parity with eager, refusals in words, whole models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import d2vkern
from d2vkern import _backend
from d2vkern._backend import BackendError, Implementation, gaps
from d2vkern._check_mode import force_checks
from d2vkern.peers.refusals import LIMITS
from d2vkern.testing import assert_bitwise_equal, assert_no_worse_than_eager, backend_spy

from . import fake_xformers
from .d2v.golden_cases import load
from .op_checks import spread, values_and_gradients
from .test_attention import make_case, make_lengths, make_positions, plain

N, S, H, D = SHAPE = (5, 13, 3, 8)
MODULE = "d2vkern.peers.attention_xformers"

# arguments of the op; every tensor is made anew by `arguments`
CASES: dict[str, dict[str, Any]] = {
    "image": {},
    "own scale": {"softmax_scale": 0.4},
    "speech": {"alibi": True},
    "speech, two extra tokens": {"alibi": True, "extra": 2},
    "slopes alone": {"alibi": True, "scale": False},
    "padded text": {"lengths": True},
    "padded text, decoder reads padding": {"lengths": True, "padded_rows": "attend"},
    "padded speech": {"alibi": True, "lengths": True},
    "padded speech, decoder reads padding": {"alibi": True, "lengths": True, "padded_rows": "attend"},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TRAINING = ("sdpa", "xformers")


@pytest.fixture(params=["sdpa", "flex", "xformers"])
def backend(request: pytest.FixtureRequest) -> str:
    """A peer that runs here; xformers by its stand-in."""
    if request.param == "xformers":
        request.getfixturevalue("xformers")
    return request.param


@pytest.fixture(params=TRAINING)
def training_backend(request: pytest.FixtureRequest) -> str:
    """A peer that runs backward here."""
    if request.param == "xformers":
        request.getfixturevalue("xformers")
    return request.param


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, installed, and allowed on CPU tensors."""
    for name, module in fake_xformers.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, MODULE, importlib.import_module(MODULE))
    monkeypatch.setattr(_backend, "_machine_gaps", lambda name: ())
    monkeypatch.setitem(_backend.REGISTRY["attention"], "xformers", Implementation(MODULE))
    fake_xformers.CALLS.clear()
    yield
    sys.modules.pop(MODULE, None)


def arguments(
    case: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves (qkv, alibi_scale or not) and the op's other arguments."""
    qkv, scale, slopes, _ = make_case(SHAPE, torch.float32)
    leaves = [qkv.detach().to(dtype).requires_grad_()]
    given: dict[str, Any] = {name: case[name] for name in ("softmax_scale", "padded_rows") if name in case}
    if case.get("alibi"):
        given |= {"slopes": slopes, "positions": make_positions(N, S, case.get("extra", 1))}
        leaves += [scale] if case.get("scale", True) else []
    if case.get("lengths"):
        given["lengths"] = make_lengths(N, S)
    return leaves, given


def call(backend: str, leaves: list[Tensor], given: dict[str, Any]) -> Tensor:
    qkv, scale = [*leaves, None][:2]
    return d2vkern.multimask_attention(qkv, alibi_scale=scale, backend=backend, **given)


def results(backend: str, leaves: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    """Values, and where the backend has them gradients."""
    if backend == "flex":
        with torch.no_grad():
            return [call(backend, leaves, given)]
    return values_and_gradients(lambda *x: call(backend, list(x), given), leaves)


@cases
def test_equals_eager(case: dict[str, Any], backend: str) -> None:
    leaves, given = arguments(case)
    with backend_spy() as calls:
        ours = results(backend, leaves, given)
    assert calls == [("attention", backend)]
    expected = results("eager", leaves, given)
    assert len(ours) == (1 if backend == "flex" else 1 + len(leaves))
    for actual, wanted in zip(ours, expected, strict=False):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["speech", "padded text", "padded speech, decoder reads padding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name: str, dtype: torch.dtype, backend: str) -> None:
    """At most twice eager's error against fp64."""
    case = CASES[name]
    leaves, given = arguments(case, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = values_and_gradients(
        lambda qkv, scale=None: plain(
            qkv,
            scale,
            *(given.get(name) for name in ("slopes", "positions", "lengths", "softmax_scale")),
            given.get("padded_rows", "zero"),
        ),
        wide,
    )
    ours, eager = results(backend, leaves, given), results("eager", leaves, given)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32][: len(ours)]
    for actual, same, reference in zip(ours[:2], eager, exact, strict=False):
        assert_no_worse_than_eager(actual, same, reference)
    if len(ours) > 2:  # three sums, whose ratio to eager's errors is chance
        assert ((ours[2] - exact[2]).abs() <= 2 * torch.finfo(dtype).eps * exact[2].abs().max()).all()


def test_a_clamped_scale_has_a_gradient_of_exactly_zero(training_backend: str) -> None:
    leaves, given = arguments(CASES["speech"])
    dscale = results(training_backend, leaves, given)[2]
    assert dscale[1] == 0 and (dscale[[0, 2]] != 0).all()


def test_padding_never_leaks(training_backend: str) -> None:
    leaves, given = arguments(CASES["padded speech"])
    out, dqkv, _ = results(training_backend, leaves, given)
    for n, length in enumerate(given["lengths"].tolist()):
        assert (out[n, length:] == 0).all() and (dqkv[n, length:] == 0).all()
        if length:
            alone = {"slopes": given["slopes"], "positions": given["positions"][n : n + 1, :length]}
            x = [leaves[0][n : n + 1, :length], leaves[1]]
            torch.testing.assert_close(out[n, :length], call("eager", x, alone)[0], rtol=2e-5, atol=2e-5)


def test_any_strides(backend: str) -> None:
    leaves, given = arguments(CASES["padded text"])
    view = [spread(leaves[0])]
    for actual, expected in zip(results(backend, view, given), results(backend, leaves, given), strict=True):
        torch.testing.assert_close(actual.contiguous(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (3, 0, 3, 2, 8)], ids=["no sequences", "no tokens"])
def test_zero_size(shape: tuple[int, ...], backend: str) -> None:
    qkv = torch.zeros(shape, requires_grad=True)
    out = results(backend, [qkv], {"lengths": torch.zeros(shape[0], dtype=torch.int32)})
    assert out[0].shape == (*shape[:2], 16) and [x.shape for x in out[1:]] == [shape] * (len(out) - 1)


def test_lengths_alone_are_block_diagonal_in_xformers(xformers: None) -> None:
    for name in ("image", "padded text", "padded speech"):
        leaves, given = arguments(CASES[name])
        call("xformers", leaves, given)
    assert fake_xformers.CALLS == ["NoneType", "BlockDiagonalMask", "Tensor"]


@pytest.mark.parametrize("name", ["padded speech", "padded text"])
def test_sdpa_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    leaves, given = arguments(CASES[name])
    compiled = torch.compile(lambda *x: call("sdpa", list(x), given), fullgraph=True, backend="aot_eager")
    ours = values_and_gradients(compiled, leaves)
    for actual, expected in zip(ours, results("sdpa", leaves, given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_flex_compiles_whole() -> None:
    torch._dynamo.reset()
    leaves, given = arguments(CASES["padded speech"])
    compiled = torch.compile(lambda *x: call("flex", list(x), given), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), call("flex", leaves, given), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_unseeded_dropout_is_the_peers_own(training_backend: str) -> None:
    qkv = torch.randn(4, 32, 3, 2, 8, requires_grad=True)

    def run() -> list[Tensor]:
        return results(training_backend, [qkv], {"dropout_p": 0.4})

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    for actual, expected in zip(run(), first, strict=True):
        assert_bitwise_equal(actual, expected)
    assert not torch.equal(first[0], second[0])
    mean = torch.stack([run()[0] for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, call("eager", [qkv], {}).detach(), rtol=0, atol=0.25)


def test_check_mode_holds_peers_against_eager(caplog: pytest.LogCaptureFixture) -> None:
    leaves, given = arguments(CASES["padded speech"])
    with force_checks(True), caplog.at_level("INFO", logger="d2vkern"):
        results("sdpa", leaves, given)
        assert not [r for r in caplog.records if "not compared" in r.getMessage()]
        call("sdpa", leaves, given | {"dropout_p": 0.5})


X = torch.zeros(2, 5, 3, 2, 8)
LEAF = torch.zeros(2, 5, 3, 2, 8, requires_grad=True)
SLOPES, SCALE = torch.ones(2), torch.ones(2, requires_grad=True)
SEED = "its dropout cannot draw the bits that a seed stands for, leave the seed out"
REFUSED: dict[str, tuple[str, Tensor, dict[str, Any], list[str]]] = {
    "sdpa, seed": ("sdpa", X, {"dropout_p": 0.1, "seed": 3}, [SEED]),
    "sdpa, seed tensor": ("sdpa", X, {"dropout_p": 0.1, "seed": torch.tensor(3)}, [SEED]),
    "sdpa, a seed that nothing uses": ("sdpa", X, {"seed": 3}, []),
    "sdpa, no seed": ("sdpa", X, {"dropout_p": 0.1}, []),
    "sdpa, fp64": ("sdpa", X.double(), {}, ["fp64 tensors run on eager only"]),
    "sdpa, scale alone on a CPU": ("sdpa", X, {"slopes": SLOPES, "alibi_scale": SCALE}, []),
    "flex, dropout": ("flex", X, {"dropout_p": 0.1}, ["it has no dropout"]),
    "flex, scale": (
        "flex",
        LEAF,
        {"slopes": SLOPES, "alibi_scale": SCALE},
        [
            "it sums the gradient of alibi_scale by atomics, in no fixed order (PyTorch pull request 137452)",
            "it has no backward on a CPU",
        ],
    ),
    "flex, frozen scale": ("flex", X, {"slopes": SLOPES, "alibi_scale": SLOPES}, []),
}


@pytest.mark.parametrize(("backend", "qkv", "given", "reasons"), REFUSED.values(), ids=REFUSED)
def test_refusals(backend: str, qkv: Tensor, given: dict[str, Any], reasons: list[str]) -> None:
    assert gaps("attention", backend, qkv, **given) == reasons


def on_gpu(*shape: int, grad: bool = False) -> Tensor:
    """A tensor that says it is on a GPU."""
    with FakeTensorMode():
        return torch.empty(shape, device="cuda", requires_grad=grad)


def test_refusals_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_machine_gaps", lambda name: ())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    narrow, odd, whole = on_gpu(2, 5, 3, 2, 8), on_gpu(2, 5, 3, 2, 12), on_gpu(2, 5, 3, 2, 16)
    scale, lengths = on_gpu(2, grad=True), on_gpu(2)
    bias = {"slopes": on_gpu(2), "alibi_scale": scale}
    crash = "it crashes where the bias alone wants a gradient (PyTorch issue 188302)"
    assert gaps("attention", "sdpa", whole, **bias) == [crash]
    assert gaps("attention", "sdpa", on_gpu(2, 5, 3, 2, 16, grad=True), **bias) == []
    assert gaps("attention", "flex", narrow) == ["it needs heads at least 16 wide, got 8"]
    assert gaps("attention", "flex", on_gpu(2, 5, 3, 2, 16, grad=True), slopes=on_gpu(2)) == []
    assert gaps("attention", "xformers", odd) == ["it needs a head width that is a multiple of 8, got 12"]
    assert gaps("attention", "xformers", whole, **bias) == [
        "it gives the bias no gradient unless qkv wants one too"
    ]
    with torch.no_grad():
        assert gaps("attention", "xformers", whole, **bias) == []
    assert gaps("attention", "xformers", whole, lengths=lengths) == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gaps("attention", "xformers", whole, lengths=lengths) == [
        "its block-diagonal mask reads lengths on the host, which a recorded graph cannot"
    ]
    assert gaps("attention", "xformers", whole, lengths=lengths, slopes=on_gpu(2)) == []


def test_a_request_names_every_reason_and_who_can() -> None:
    with pytest.raises(BackendError) as error:
        d2vkern.multimask_attention(LEAF, dropout_p=0.1, backend="flex")
    refused, available = str(error.value).split(". Available here: ")
    assert refused == (
        "attention: backend 'flex', requested by argument backend, cannot run: it has no dropout; it has no "
        "backward on a CPU"
    )
    assert {"eager", "sdpa"} <= set(available.split(", ")) <= {"eager", "sdpa", "triton"}
    with d2vkern.use_backend(attention="sdpa"), pytest.raises(BackendError, match=SEED):
        d2vkern.multimask_attention(X, dropout_p=0.1, seed=1)


def test_a_refusal_survives_tracing() -> None:
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: d2vkern.multimask_attention(x, dropout_p=0.1, seed=1, backend="sdpa"),
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(Exception, match="leave the seed out"):
        run(X)
    torch._dynamo.reset()


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_missing_xformers_is_a_reason() -> None:
    with pytest.raises(BackendError, match="'xformers'.*cannot run: xformers is not installed; .*CUDA"):
        d2vkern.multimask_attention(X, backend="xformers")


def test_limits_are_told_for_every_peer() -> None:
    assert set(LIMITS) == {name for names in _backend.PEERS.values() for name in names}
    for stem, names in _backend.PEERS.items():
        table = _backend.REGISTRY[stem]
        limits = {name: one.limits for name, one in table.items() if one.limits}
        assert limits == {name: LIMITS[name] for name in names}
    attention = [_backend.REGISTRY["attention"][name] for name in _backend.PEERS["attention"]]
    assert all(one.auto == () for one in attention), "auto takes a peer of attention by measurement only"


@pytest.mark.parametrize("name", ["audio_base", "audio_padded"])
def test_golden_audio(name: str, training_backend: str, goldens: Path) -> None:
    """The original's losses and gradients, every attention of the model on the peer."""
    case = load(goldens, name)
    model = case.model()
    with backend_spy() as calls, d2vkern.use_backend(attention=training_backend):
        out = model(**case.inputs())
        out.loss.backward()
    assert {used for stem, used in calls if stem == "attention"} == {training_backend}
    assert out.loss.item() == pytest.approx(case.facts["scalars"]["total_loss"], rel=1e-5)
    norms = []
    for key, p in model.named_parameters():
        expected = case.tensors.get(f"grad.{key}")
        if expected is None:
            continue
        assert p.grad is not None
        norms.append(p.grad.norm())
        error = (p.grad.double() - expected.double()).norm() / expected.double().norm()
        assert error <= (1e-4 if key.endswith("alibi_scale") else 1e-5), key
    total = torch.stack(norms).norm().item()
    assert total == pytest.approx(case.facts["scalars"]["grad_norm_total"], rel=1e-5)


def test_golden_audio_forward_on_flex(goldens: Path) -> None:
    """Loss and features without gradients, which is what flex can do on a CPU."""
    case = load(goldens, "audio_padded")
    model = case.model()
    with torch.no_grad(), backend_spy() as calls, d2vkern.use_backend(attention="flex"):
        loss = model(**case.inputs()).loss
        features = model.features(case.tensors["in.source"], case.tensors.get("in.padding_mask"))
    assert {used for stem, used in calls if stem == "attention"} == {"flex"}
    assert loss.item() == pytest.approx(case.facts["scalars"]["total_loss"], rel=1e-5)
    expected = case.tensors["feat.x"]
    assert (features.x - expected).norm() <= 1e-5 * expected.norm()
