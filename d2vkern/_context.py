"""What the code that runs now has requested of backends, and how that reaches what runs elsewhere.

A request belongs to its thread. Two kinds of code run outside of the block that they belong to: activation
checkpointing runs a function again in backward, wherever that is called, and the backward of a GPU runs in
threads of autograd. So importing d2vkern hooks torch.utils.checkpoint, with and without reentrant autograd: a
recomputation runs under the request of its forward. And in autograd's threads the request of the thread that
called backward holds, where torch hands its context on, as 2.13 does.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils import checkpoint

Result = TypeVar("Result")
Requests = dict[str, str]
Spies = tuple[list[tuple[str, str]], ...]


class _ThreadState(threading.local):
    """What the current thread has requested, per stem, and who wants to know what ran."""

    # Set per instance: Dynamo guards an instance attribute, but not one that is found on the class.
    def __init__(self) -> None:
        self.requested: Requests = {}
        self.spies: Spies = ()
        self.outside = True
        """of all blocks: nothing was requested here"""
        self.reentrant = False
        """checkpointing that runs a function first without gradients, then again with them"""


state = _ThreadState()
_handed_on: ContextVar[tuple[Requests, Spies]] = ContextVar("d2vkern", default=({}, ()))
"""the same for threads that this one's backward uses"""


def current() -> tuple[Requests, Spies]:
    """Stem -> backend that is requested here, and the lists of `watch`."""
    if state.outside and not torch.compiler.is_compiling() and torch._C._is_key_in_tls("context"):
        requested, spies = torch._C._get_obj_in_tls("context").get(_handed_on, ({}, ()))
        return requested, state.spies or spies
    return state.requested, state.spies


@contextmanager
def request(requested: Requests) -> Iterator[None]:
    """Stem -> backend for the block, in place of what was requested."""
    outer = state.requested, state.spies, state.outside
    _, spies = current()
    state.requested, state.spies, state.outside = requested, spies, False
    _hand_on()
    try:
        yield
    finally:
        state.requested, state.spies, state.outside = outer
        _hand_on()


@contextmanager
def watch(calls: list[tuple[str, str]]) -> Iterator[None]:
    """The list receives (stem, backend) of every call in the block."""
    outer = state.spies
    state.spies = (*outer, calls)
    _hand_on()
    try:
        yield
    finally:
        state.spies = outer
        _hand_on()


def keep_backend(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, under the backends that are requested here, whenever and in any thread it is called.

    torch.utils.checkpoint needs no help; to checkpointing that others have written hand what this returns.
    """
    return _bind(function, state.reentrant)


def _bind(function: Callable[..., Result], reentrant: bool) -> Callable[..., Result]:
    requested, _ = current()

    def bound(*args: Any, **kwargs: Any) -> Result:
        outer, state.reentrant = state.reentrant, reentrant
        try:
            with request(requested):
                return function(*args, **kwargs)
        finally:
            state.reentrant = outer

    return bound


def _hand_on() -> None:
    if not torch.compiler.is_compiling():
        _handed_on.set((state.requested, state.spies))


def _follow_checkpoints() -> bool:
    """Bind what torch.utils.checkpoint will run again: it is given to these two. False: not in this torch."""
    frame = getattr(checkpoint, "_CheckpointFrame", None)
    function = getattr(checkpoint, "CheckpointFunction", None)
    if frame is None or function is None:
        return False
    make, forward = frame.__init__, function.forward

    @functools.wraps(make)
    def init(self: Any, recompute_fn: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        make(self, keep_backend(recompute_fn), *args, **kwargs)

    @functools.wraps(forward)
    def bound_forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, _bind(run_function, True), *args)

    frame.__init__, function.forward = init, staticmethod(bound_forward)
    return True


follows_checkpoints = _follow_checkpoints()


def is_lost() -> bool:
    """Whether what runs now may be a recomputation whose request is not known."""
    return not follows_checkpoints and state.outside and torch._C._current_graph_task_id() != -1
