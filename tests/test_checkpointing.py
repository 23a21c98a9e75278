"""Backends of what runs again or elsewhere: activation checkpointing, autograd's own threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

import d2vkern
from d2vkern import _backend, _check_mode, _context
from d2vkern._backend import Implementation
from d2vkern.testing import assert_bitwise_equal, backend_spy

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def in_a_thread(call: Callable[[], Any]) -> None:
    """As backward of a GPU, which has no block of the thread that called it."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def in_the_pool(call: Callable[[], Any]) -> None:
    """In a real thread of autograd: backward within backward, until torch takes one of its pool."""
    caller = threading.get_ident()

    class Deeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            call() if threading.get_ident() != caller else deeper()
            return grad

    @torch.enable_grad()
    def deeper() -> None:
        Deeper.apply(torch.ones((), requires_grad=True)).backward()

    deeper()


PLACES: dict[str, Callable[[Callable[[], Any]], None]] = {
    "outside": lambda call: call(), "thread": in_a_thread, "pool": in_the_pool,
}  # fmt: skip


def inside_another(call: Callable[[], Any]) -> None:
    with d2vkern.use_backend("triton"):
        call()


def in_the_pool_of_another(call: Callable[[], Any]) -> None:
    with d2vkern.use_backend("triton"):
        in_the_pool(call)


PLACES |= {"another block": inside_another, "pool of another block": in_the_pool_of_another}
somewhere = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


class Block(nn.Module):
    """Attention, norm, MLP, dropped out: what a checkpointed block of a user is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(2))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, s, d = x.shape
        qkv = d2vkern.linear(x, self.qkv.weight, self.qkv.bias).view(n, s, 3, 2, d // 2)
        positions = torch.arange(s).expand(n, s)
        out = d2vkern.multimask_attention(
            qkv, positions=positions, slopes=torch.tensor([0.5, 0.25]), alibi_scale=self.scale, dropout_p=0.1
        )
        out = d2vkern.residual_norm(x, out, self.norm.weight, self.norm.bias, dropout_p=0.1)
        return out + d2vkern.gelu_mlp(out, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def gradients(block: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    return found


def made() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block(), torch.randn(2, 3, 8, requires_grad=True)


BACKENDS = pytest.mark.parametrize(
    "requested",
    [{"default": "eager"}, {"default": "eager", "residual_norm": "triton"}],
    ids=["eager", "mixed"],
)


def watched_backward(loss: Tensor, place: Callable[[Callable[[], Any]], None]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []

    def backward() -> None:
        with _context.watch(calls):
            loss.backward()

    place(backward)
    return calls


@BACKENDS
@REENTRANT
@somewhere
def test_what_runs_again_is_on_the_backends_of_its_forward(
    place: Callable[[Callable[[], Any]], None], reentrant: bool, requested: dict[str, str]
) -> None:
    """By plain torch.utils.checkpoint; gradients are those without it, bit for bit."""
    pytest.importorskip("triton")
    block, x = made()
    with d2vkern.use_backend(**requested):
        torch.manual_seed(1)
        block(x).square().sum().backward()
        expected = gradients(block)
        torch.manual_seed(1)
        with backend_spy() as forward:
            loss = checkpoint(block, x, use_reentrant=reentrant).square().sum()
    again = watched_backward(loss, place)
    for ours, theirs in zip(gradients(block), expected, strict=True):
        assert_bitwise_equal(ours, theirs)
    assert len(forward) == 4
    assert again == forward


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of nested ones
@REENTRANT
def test_a_block_inside_the_function_still_wins(reentrant: bool) -> None:
    """It is entered again by the function itself, and what is nested in it too."""
    block, x = made()

    def inner(x: Tensor) -> Tensor:
        return d2vkern.residual_norm(x, x).square()

    def function(x: Tensor) -> Tensor:
        x = inner(x)
        with d2vkern.use_backend(residual_norm="triton"):
            x = checkpoint(inner, x, use_reentrant=reentrant)
            x = d2vkern.linear(x, block.proj.weight)
        return inner(x)

    with d2vkern.use_backend("eager"), backend_spy() as forward:
        loss = checkpoint(function, x, use_reentrant=reentrant).square().sum()
    assert [name for _, name in forward] == ["eager", "triton", "eager", "eager"]
    with d2vkern.use_backend("eager", mlp="triton"), backend_spy() as calls:
        loss.backward()
    assert calls[:4] == forward and calls[4:] == [("residual_norm", "triton")]


@REENTRANT
@pytest.mark.parametrize("place", [inside_another, in_the_pool_of_another])
def test_a_forward_outside_of_blocks_stays_outside(
    place: Callable[[Callable[[], Any]], None], reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = made()
    monkeypatch.setenv("D2VKERN_BACKEND", "eager")
    with backend_spy() as calls:
        loss = checkpoint(block, x, use_reentrant=reentrant).square().sum()
    assert {name for _, name in calls} == {"eager"}
    assert watched_backward(loss, place) == calls


@pytest.mark.parametrize("checked", [False, True])
@REENTRANT
def test_checks_hold_recomputations_against_eager_too(reentrant: bool, checked: bool) -> None:
    pytest.importorskip("triton")
    block, x = made()
    with _check_mode.force_checks(checked):
        with d2vkern.use_backend("eager", residual_norm="triton"):
            torch.manual_seed(1)
            block(x).square().sum().backward()
            expected = gradients(block)
            torch.manual_seed(1)
            loss = checkpoint(block, x, use_reentrant=reentrant).square().sum()
        in_a_thread(loss.backward)
    for ours, theirs in zip(gradients(block), expected, strict=True):
        assert_bitwise_equal(ours, theirs)


def test_hooks_in_threads_of_autograd_follow_the_block_around_backward() -> None:
    """As on a GPU, where all of backward runs in one."""
    if not hasattr(torch._C, "_remove_obj_from_tls"):
        pytest.skip("this torch hands no context on")
    x = torch.ones(2, 3, requires_grad=True)
    with d2vkern.use_backend("eager"), backend_spy() as calls:
        in_the_pool(lambda: d2vkern.residual_norm(x, x))
        in_the_pool(lambda: d2vkern.residual_norm(x, x, backend="triton"))
    assert calls == [("residual_norm", "eager"), ("residual_norm", "triton")]
    with backend_spy() as calls:
        in_the_pool(lambda: d2vkern.residual_norm(x, x))
    assert calls == [("residual_norm", "eager")]  # auto's
    assert _context.current() == ({}, ())


@REENTRANT
def test_other_options_of_checkpointing_stay(reentrant: bool) -> None:
    """Contexts of the user, keyword arguments, no early stop, sequences."""
    block, x = made()
    entered: list[str] = []

    @contextlib.contextmanager
    def note(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    with d2vkern.use_backend("eager"):
        if reentrant:
            loss = checkpoints.checkpoint_sequential([block, block], 2, x, use_reentrant=True).sum()
        else:
            with checkpoints.set_checkpoint_early_stop(False):
                loss = checkpoint(
                    lambda x, scale: scale * block(x), x, scale=2.0, use_reentrant=False,
                    context_fn=lambda: (note("forward"), note("again")),
                ).sum()  # fmt: skip
    with backend_spy() as calls:
        loss.backward()
    assert {name for _, name in calls} == {"eager"}
    assert entered == ([] if reentrant else ["forward", "again"])


@pytest.fixture
def choosy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op whose first choice has no backward."""
    table = dict(_backend.REGISTRY["residual_norm"])
    eager = table["eager"].module
    table = {
        "triton": Implementation(
            eager, lambda x, *_, **__: ["no backward"] * (x.requires_grad and torch.is_grad_enabled())
        ),
        "eager": Implementation(eager),
    }
    monkeypatch.setitem(_backend.REGISTRY, "residual_norm", table)


@pytest.mark.usefixtures("choosy")
@REENTRANT
def test_auto_chooses_alike_with_and_without_gradients(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reentrant checkpointing runs first without gradients."""
    monkeypatch.setattr(_backend, "_machine_gaps", lambda name: ())
    x = torch.randn(3, 4, requires_grad=True)
    with backend_spy() as calls:
        d2vkern.residual_norm(x.detach(), x.detach())
        d2vkern.residual_norm(x, x)
    assert [name for _, name in calls] == ["triton", "eager"]

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = d2vkern.residual_norm(x, x)
        with d2vkern.use_backend(mlp="eager"):
            return d2vkern.residual_norm(x + y, x).square()

    with backend_spy() as calls:
        y = checkpoint(function, x, use_reentrant=reentrant)
        forward = [name for _, name in calls]
        y.sum().backward()
    assert forward == ["eager", "eager"] if reentrant else ["triton", "eager"]
    assert [name for _, name in calls] == forward * 2


class Recomputing(torch.autograd.Function):
    """Checkpointing as others write it."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        y.backward(grad)
        return None, x.grad


@somewhere
def test_others_checkpointing_keeps_backends_too(place: Callable[[Callable[[], Any]], None]) -> None:
    block, x = made()
    with d2vkern.use_backend("eager", residual_norm="triton"), backend_spy() as calls:
        loss = Recomputing.apply(d2vkern.keep_backend(block), x).sum()
    assert watched_backward(loss, place) == calls


def test_a_torch_that_cannot_be_followed_is_no_silent_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CheckpointFrame", "CheckpointFunction"):
        with monkeypatch.context() as patch:
            patch.delattr(checkpoints, name)
            assert not _context._follow_checkpoints()
    monkeypatch.setattr(_context, "follows_checkpoints", False)
    block, x = made()
    with d2vkern.use_backend("eager"):
        losses = [Recomputing.apply(f, x).sum() for f in (block, d2vkern.keep_backend(block))]
    with pytest.raises(d2vkern.BackendError, match=r"mlp: called in backward, .* keep_backend\(function\)"):
        losses[0].backward()
    losses[1].backward()
    d2vkern.residual_norm(x, x).sum().backward()
