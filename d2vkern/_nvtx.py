"""NVTX ranges of the ops, in the domain "d2vkern", named like "d2vkern/ema/fwd/triton".

Without a profiler attached NVTX is a null check in C. Dynamo cannot trace range calls (PyTorch issue 149552),
so a range vanishes from code that is being traced; the bodies of registered ops are untraced and keep theirs.
"""

from contextlib import AbstractContextManager, nullcontext

import nvtx
import torch

DOMAIN = "d2vkern"


def nvtx_range(name: str) -> AbstractContextManager[object]:
    """A context manager that marks its block as `name` in a profile."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return nvtx.annotate(name, domain=DOMAIN)
