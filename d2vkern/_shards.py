"""DTensors (FSDP2, tensor parallelism): what works element by element works on the shards held here.

No process waits for another in these functions but `replicated`.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)


def is_sharded(value: object) -> bool:
    """Whether a value is a DTensor; torch.distributed.tensor is not imported for the question."""
    return any_sharded((value,))


def any_sharded(values: Iterable[object]) -> bool:
    """Whether one of them is; hundreds of tensors a step are asked, so the question is short."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    kind = module.DTensor
    return any(isinstance(value, kind) for value in values)


def local(tensors: Sequence[_Maybe]) -> list[_Maybe]:
    """The part of each tensor that this process holds; of plain tensors all."""
    if not any_sharded(tensors):
        return list(tensors)
    return [cast(Any, x).to_local() if is_sharded(x) else x for x in tensors]


def check_same_shards(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless both are whole, or distributed alike."""
    if not is_sharded(tensor) and not is_sharded(like):
        return
    ours, theirs = _layout(tensor), _layout(like)
    if ours != theirs:
        raise ValueError(f"{op}: {name} must be distributed like {like_name}, {theirs}, got {ours}")


def replicated(value: Any) -> Any:
    """A scalar as a plain tensor: a gradient norm of DTensors is one whose parts must still be added up."""
    return value.full_tensor() if is_sharded(value) else value


def _layout(tensor: Any) -> str:
    return f"{tensor.placements} on {tensor.device_mesh}" if is_sharded(tensor) else "not distributed"
