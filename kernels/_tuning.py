"""Launch configurations by GPU and shape bucket: looked up, never searched for while training.

A launcher names its kernel and bucket and lists candidates, the first of which serves where nothing was
measured. `tuned.json` maps GPU name -> kernel -> bucket -> configuration; `python -m benchmarks.tune`
measures the candidates on the GPU at hand and rewrites that GPU's part.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import torch

from d2vkern._listeners import listening

Config = dict[str, int]

TABLE = Path(__file__).with_name("tuned.json")
_forced: dict[tuple[str, str], Config] = {}
_asked: list[dict[tuple[str, str], list[Config]]] = []


def choose(kernel: str, bucket: str, candidates: Sequence[Config]) -> Config:
    """The configuration of `kernel` for shapes of `bucket`: constexprs, num_warps and num_stages by name."""
    key = (kernel, bucket)
    for asked in _asked:
        asked[key] = list(candidates)
    if key in _forced:
        return _forced[key]
    return read_table().get(_gpu(), {}).get(kernel, {}).get(bucket, candidates[0])


@contextmanager
def forced(kernel: str, bucket: str, config: Config) -> Iterator[None]:
    """Use `config` for one kernel and bucket in the block: how candidates are compared."""
    _forced[kernel, bucket] = config
    try:
        yield
    finally:
        del _forced[kernel, bucket]


def record_choices() -> AbstractContextManager[dict[tuple[str, str], list[Config]]]:
    """Yield a dict that receives (kernel, bucket) -> candidates of every choice made in the block."""
    return listening(_asked, {})


def power_of_two_bucket(**sizes: int) -> str:
    """Sizes rounded up to powers of two, as a bucket's name: `rows=40_000` is "rows65536"."""
    return " ".join(f"{name}{1 << max(0, size - 1).bit_length()}" for name, size in sizes.items())


@cache
def read_table() -> dict[str, dict[str, dict[str, Config]]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@cache
def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
