"""What the ops have no derivatives or traces for, refused in one line that names the op.

They are autograd.Functions whose backward passes are written out, so torch would refuse most of this as well,
but in words about those; and torch.jit.trace and the second derivative for a constant gradient, which it
takes, would be wrong.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backward = Callable[..., tuple[Tensor | None, ...]]


def check_supported(stem: str) -> None:
    """Raise NotImplementedError under torch.func's transforms, forward-mode AD and torch.jit.trace."""
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"{stem}: torch.jit.trace, and torch.onnx.export(dynamo=False) with it, would record a wrong "
            "graph; use torch.export.export, or torch.onnx.export(dynamo=True)"
        )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{stem}: has no rule for torch.func's transforms (vmap, grad, jvp ...) or forward-mode AD; "
            "batch by the leading dimensions, differentiate by backward, or compute it by torch's operators"
        )


def first_order(op: str, instead: str = "compute it by torch's operators") -> Callable[[Backward], Backward]:
    """Decorator of a backward pass that cannot be differentiated, and whose gradients say so when they are.

    torch's own, once_differentiable, leaves gradients alone where the gradient that arrives is a constant:
    a penalty on the gradients of a sum would silently count as one.
    """
    message = f"{op}: has no second derivative (create_graph=True, double backward); {instead}"

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *douts)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients
            # The error stands where the gradients depend on what they were computed from.
            leaves = [getattr(node, "variable", None) for node, _ in ctx.next_functions]
            causes = [t for t in (*douts, *ctx.saved_tensors, *leaves) if t is not None and t.requires_grad]
            given: list[Any] = [*gradients, *causes]
            refuse = torch._C._functions.DelayedError(message, len(given))
            return tuple(refuse(*given)[: len(gradients)])

        return once

    return decorate
