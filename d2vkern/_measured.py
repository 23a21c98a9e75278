"""Measured times of an op's backends: where there are some, auto goes by them.

measured.json: machine -> "ops" -> op -> bucket -> backend -> median microseconds of a call, and beside "ops"
what the machine was. Machine is the GPU's name, or "cpu", its vector width, vendor and family: AMD's
processors and Intel's run other code for the same product. `python -m benchmarks.choose` measures on the
machine at hand and rewrites its part. Calls that torch.compile traces do not look: the times are those of
calls that run as they stand, and a bucket would tie the compiled code to its sizes.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2vkern import _cpu
from d2vkern._costs import bucket
from d2vkern._listeners import listening

TABLE = Path(__file__).with_name("measured.json")
Times = dict[str, float]

_asked: list[list[str]] = []


def attention_bucket(
    qkv: Tensor,
    *,
    slopes: Tensor | None = None,
    alibi_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    **_: Any,
) -> str:
    """Everything that changes which backend is fastest: dtype, sizes, bias, padding, dropout, backward."""
    wanted = qkv.requires_grad or (alibi_scale is not None and alibi_scale.requires_grad)
    words = [str(qkv.dtype).removeprefix("torch."), bucket(S=qkv.shape[1], Dh=qkv.shape[4])]
    words += ["alibi"] * (slopes is not None) + ["lengths"] * (lengths is not None)
    words += ["dropout"] * (dropout_p > 0) + ["train" if wanted and torch.is_grad_enabled() else "forward"]
    return " ".join(words)


BUCKETS: dict[str, Callable[..., str]] = {"attention": attention_bucket}
"""ops that have more than one backend worth measuring against each other"""


def order(stem: str, tensors: tuple[Tensor, ...], call: dict[str, Any]) -> tuple[str, list[str]] | None:
    """(where and for which bucket it was measured, backends from the fastest on); None: not measured."""
    if stem not in BUCKETS or not tensors:
        return None
    where = machine(tensors[0].device.type)
    buckets = times_of(where).get(stem)
    if buckets is None and not _asked:
        return None
    name = BUCKETS[stem](*tensors, **call)
    for asked in _asked:
        asked.append(name)
    times = (buckets or {}).get(name)
    return None if times is None else (f"{where}, {name}", sorted(times, key=times.__getitem__))


@cache
def machine(device: str) -> str:
    """The name that measurements on this device have in the table."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "cpu":
        make = _cpu.processor()
        known = f" {make.vendor} {make.family}" if make.vendor else ""
        return f"cpu {torch.backends.cpu.get_cpu_capability()}{known}"
    return device


def times_of(where: str) -> dict[str, dict[str, Times]]:
    """op -> bucket -> backend -> microseconds on that machine; empty where nothing was measured."""
    return read_table(TABLE).get(where, {}).get("ops", {})


def record_buckets() -> AbstractContextManager[list[str]]:
    """Yield a list that receives the bucket of every call that is left to auto in the block."""
    return listening(_asked, [])


@cache
def read_table(path: Path) -> dict[str, Any]:
    """The file's content. ValueError, naming the entry, for what is not a table of times."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: must be JSON, got {error}") from error
    for where, part in _items(path, "the table", table):
        ops = dict(_items(path, where, part)).get("ops", {})
        for stem, buckets in _items(path, f"{where}, ops", ops):
            for name, times in _items(path, f"{where}, {stem}", buckets):
                for backend, us in _items(path, f"{where}, {stem}, {name}", times):
                    if isinstance(us, bool) or not isinstance(us, (int, float)) or not us > 0:
                        entry = f"{where}, {stem}, {name}, {backend}"
                        raise ValueError(f"{path.name}: {entry} must be microseconds, got {us!r}")
    return table


def _items(path: Path, name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: {name} must be an object, got {value!r}")
    return value.items()
