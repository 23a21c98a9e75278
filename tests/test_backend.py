"""Backend selection: order of precedence, refusals and their words, threads, compiled code."""

import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import d2vkern
from d2vkern import _backend, _native
from d2vkern._backend import BackendError, Implementation, select
from d2vkern.testing import backend_spy


def _unsupported(x: Tensor) -> list[str]:
    return ["x has an integer dtype"] if x.dtype == torch.int64 else []


@pytest.fixture(autouse=True)
def two_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A `gather` that adds 1 in eager and 2 in native (floating point only, and not chosen by auto)."""
    table = {}
    for name, amount, hook in (("eager", 1, None), ("native", 2, _unsupported)):
        module = types.ModuleType(f"fake_{name}")
        module.add = lambda x, amount=amount: x + amount
        monkeypatch.setitem(sys.modules, module.__name__, module)
        table[name] = Implementation(module.__name__, hook)
    monkeypatch.setitem(_backend.REGISTRY, "gather", table)
    _native.problem()  # loads it: tracing imports what stands on it
    monkeypatch.setattr(_native, "problem", lambda: "")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def add(x: Tensor, backend: str | None = None) -> Tensor:
    return select("gather", backend, x).add(x)


def add_in_context(x: Tensor) -> Tensor:
    with d2vkern.use_backend("eager", gather="native"):
        return add(x) + add(x, backend="eager")


X = torch.zeros(1)
EAGER, NATIVE = 1.0, 2.0


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert add(X).item() == EAGER
    monkeypatch.setenv("D2VKERN_BACKEND", "native")
    assert add(X).item() == NATIVE
    with d2vkern.use_backend("eager"):
        assert add(X).item() == EAGER
        assert add(X, backend="native").item() == NATIVE
    monkeypatch.setenv("D2VKERN_BACKEND", " native, gather = eager ")
    assert add(X).item() == EAGER
    monkeypatch.setenv("D2VKERN_BACKEND", "")
    assert add(X, backend="native").item() == NATIVE


def test_contexts_nest_and_end() -> None:
    with d2vkern.use_backend(gather="native"):
        with d2vkern.use_backend(attention="eager"):
            assert add(X).item() == NATIVE
        with d2vkern.use_backend("eager"):
            assert add(X).item() == EAGER
        assert add(X).item() == NATIVE
    assert add(X).item() == EAGER
    with pytest.raises(RuntimeError, match="stop"), d2vkern.use_backend("native"):
        raise RuntimeError("stop")
    assert add(X).item() == EAGER


def test_context_belongs_to_its_thread() -> None:
    seen = []
    with d2vkern.use_backend("native"):
        thread = threading.Thread(target=lambda: seen.append(add(X).item()))
        thread.start()
        thread.join()
        assert add(X).item() == NATIVE
    assert seen == [EAGER]


def test_argument_that_cannot_be_met_names_every_reason() -> None:
    with pytest.raises(BackendError) as error:
        add(torch.zeros(1, dtype=torch.int64), backend="native")
    assert str(error.value) == (
        "gather: backend 'native', requested by argument backend, cannot run: x has an integer dtype. "
        "Available here: eager"
    )
    assert isinstance(error.value, ValueError)


def test_impossible_context_and_environment_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "cannot run: not built yet in this version; .*no CUDA device.* Available here: eager, native"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with d2vkern.use_backend("triton"), pytest.raises(BackendError, match="context use_backend, " + words):
        add(X)
    monkeypatch.setenv("D2VKERN_BACKEND", "triton")
    with pytest.raises(BackendError, match="environment D2VKERN_BACKEND, " + words):
        add(X)


def test_a_build_for_another_torch_says_that_its_kernels_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for loads, found in (
        (False, ["its kernels do not load beside this torch: python -m xformers.info"]),
        (True, []),
    ):
        monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(_has_cpp_library=loads))
        assert _backend.gaps("attention", "xformers") == found


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton is not installed" in _backend.gaps("mlp", "triton")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"default": "eagre"}, "unknown backend 'eagre' in use_backend, did you mean 'eager'"),
        ({"gather": "sdpa"}, "gather: unknown backend 'sdpa'.*backends of gather: eager, triton, native"),
        ({"gathr": "eager"}, "unknown op 'gathr', did you mean 'gather'"),
        ({"default": "sdpa"}, "'sdpa' is a backend of attention only, write attention=sdpa"),
    ],
)
def test_unknown_names_in_context(request_: dict[str, str], words: str) -> None:
    with pytest.raises(BackendError, match=words), d2vkern.use_backend(**request_):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("tritn", "unknown backend 'tritn' in environment D2VKERN_BACKEND, did you mean 'triton'"),
        (
            "eager,atention=sdpa",
            "environment D2VKERN_BACKEND: unknown op 'atention', did you mean 'attention'",
        ),
        ("eager,triton", "environment D2VKERN_BACKEND: two backends for all ops, 'eager' and 'triton'"),
        ("gather=", "unknown backend '' in environment D2VKERN_BACKEND; backends of gather"),
    ],
)
def test_unknown_names_in_environment(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    monkeypatch.setenv("D2VKERN_BACKEND", value)
    with pytest.raises(BackendError, match=words):
        add(X)


def test_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(
        BackendError, match="unknown backend 'nativ' in argument backend, did you mean 'native'"
    ):
        add(X, backend="nativ")


def test_attention_takes_its_own_names() -> None:
    with d2vkern.use_backend("eager", attention="sdpa"):
        assert _backend.state.requested["attention"] == "sdpa"
        assert _backend.state.requested["mlp"] == "eager"
    assert set(_backend.backend_names("attention")) - set(_backend.backend_names("mlp")) == {
        "sdpa",
        "flex",
        "xformers",
    }


def test_auto_takes_the_first_that_can_and_logs_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_backend, "_announced", set())
    monkeypatch.setitem(
        _backend.REGISTRY,
        "gather",
        {
            "native": Implementation("fake_native", lambda x: ["not today"]),
            "eager": Implementation("fake_eager"),
        },
    )
    with caplog.at_level(logging.INFO, logger="d2vkern"):
        assert add(X).item() == EAGER
        assert add(X).item() == EAGER
    assert [record.getMessage() for record in caplog.records] == [
        "gather: auto chose backend eager (not measured)"
    ]


def test_explicit_choice_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger="d2vkern"):
        add(X, backend="native")
    assert not caplog.records


def test_spy_records_what_ran() -> None:
    with backend_spy() as calls:
        add(X)
        with backend_spy() as inner, d2vkern.use_backend("native"):
            add(X)
    add(X)
    assert calls == [("gather", "eager"), ("gather", "native")]
    assert inner == [("gather", "native")]


def test_compiled_code_follows_the_context() -> None:
    compiled = torch.compile(add, fullgraph=True, backend="eager")
    assert compiled(X).item() == EAGER
    with d2vkern.use_backend("native"):
        assert compiled(X).item() == NATIVE
    assert compiled(X).item() == EAGER
    assert compiled(X, backend="native").item() == NATIVE


def test_context_inside_compiled_code() -> None:
    compiled = torch.compile(add_in_context, fullgraph=True, backend="eager")
    assert compiled(X).item() == NATIVE + EAGER
    assert compiled(X).item() == NATIVE + EAGER
    assert _backend.state.requested == {}


def test_spy_sees_compiled_calls() -> None:
    compiled = torch.compile(add, fullgraph=True, backend="eager")
    compiled(X)
    with backend_spy() as calls:
        compiled(X)
        compiled(X)
    assert calls == [("gather", "eager")] * 2


def test_refusal_survives_tracing() -> None:
    compiled = torch.compile(add, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="x has an integer dtype"):
        compiled(torch.zeros(1, dtype=torch.int64), backend="native")


def test_import_loads_neither_triton_nor_the_trainer() -> None:
    program = "import sys, d2vkern; print([name for name in ('triton', 'd2v') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_ops_that_were_never_imported_compile_together() -> None:
    program = (
        "import torch, d2vkern\n"
        "x, w = torch.randn(3, 8), torch.randn(8, 8)\n"
        "def both(x):\n"
        "    y = d2vkern.gelu_mlp(x, w, None, w, None, backend='eager')\n"
        "    return d2vkern.residual_norm(x, y, backend='eager')\n"
        "torch.testing.assert_close(torch.compile(both, fullgraph=True, backend='aot_eager')(x), both(x))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
