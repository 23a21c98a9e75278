"""Argument checks of the public functions: the wording of every error in one place.

The form is "op: argument must <contract>, got <value>". All checks look at metadata only (no device sync) and
are traceable by torch.compile.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def check_tensor(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_shape(
    op: str, name: str, tensor: Tensor, expected: tuple[int | str | None, ...], like: str = ""
) -> None:
    """Raise ValueError unless the tensor has the expected shape (TypeError when it is no tensor).

    expected: per dimension its size, or a letter that the docstring uses ("N", "D": any size, but the same
        wherever the letter repeats), or None (any size).
    like: the argument the sizes come from, named in the message.
    """
    check_tensor(op, name, tensor)
    free: dict[str, int] = {}
    fits = tensor.dim() == len(expected)
    if fits:
        for size, want in zip(tensor.shape, expected, strict=True):
            if isinstance(want, str):
                want = free.setdefault(want, size)
            if want is not None and size != want:
                fits = False
    if not fits:
        origin = f" like {like}" if like else ""
        raise ValueError(
            f"{op}: {name} must have shape {_show(expected)}{origin}, got {_show(tuple(tensor.shape))}"
        )


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor has a last dimension (TypeError when it is no tensor)."""
    check_tensor(op, name, tensor)
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} must have shape (..., D), got ()")


def check_convolution(op: str, weight: Tensor) -> None:
    """Raise ValueError for a weight (O, C, ...) without values: nothing would be convolved or normed."""
    for name, size in zip(("output channels O", "input channels C"), weight.shape[:2], strict=True):
        check_range(op, name, size, minimum=1)
    for size in weight.shape[2:]:
        check_range(op, "kernel size k", size, minimum=1)


def check_seed(op: str, seed: Any) -> Any:
    """An int seed's 64 bits in two's complement, whether it was given signed or unsigned; a tensor as it is.

    Raises TypeError for anything but an int or a 0-dim int64 tensor (which is not read), ValueError for an
    int of more than 64 bits.
    """
    if isinstance(seed, Tensor):
        check_shape(op, "seed", seed, ())
        check_dtype(op, "seed", seed, (torch.int64,))
        return seed
    if not isinstance(seed, (int, torch.SymInt)):
        if not hasattr(seed, "__index__"):
            raise TypeError(f"{op}: seed must be an int or a 0-dim int64 tensor, got {type(seed).__name__}")
        seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must have 64 bits, -2^63 to 2^64 - 1, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Collection[torch.dtype] = FLOATS) -> None:
    """Raise TypeError unless the tensor's dtype is one of `allowed`."""
    check_tensor(op, name, tensor)
    if tensor.dtype not in allowed:
        names = " or ".join(_short(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} must have dtype {names}, got {_short(tensor.dtype)}")


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless all given tensors share one dtype; None entries are skipped."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in given[1:]:
        first, reference = given[0]
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{op}: {name} must have dtype {_short(reference.dtype)} like {first}, "
                f"got {_short(tensor.dtype)}"
            )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device; None entries are skipped."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in given[1:]:
        first, reference = given[0]
        if tensor.device != reference.device:
            raise ValueError(f"{op}: {name} must be on {reference.device} like {first}, got {tensor.device}")


def check_choice(op: str, name: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{op}: {name} must be one of {known}, got {value!r}")


def check_range(
    op: str,
    name: str,
    value: float,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ValueError unless minimum <= value <= maximum and value < below, where given; NaN raises."""
    inside = (
        value == value
        and (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (below is None or value < below)
    )
    if not inside:
        bounds = [
            f"{sign} {bound}"
            for sign, bound in ((">=", minimum), ("<=", maximum), ("<", below))
            if bound is not None
        ]
        raise ValueError(f"{op}: {name} must be {' and '.join(bounds) or 'a number'}, got {value}")


def _show(shape: tuple[int | str | None, ...]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
