"""What the in-place ops of many tensors share.

On CUDA the addresses wait in a table on the device, made here (kernels/_table.py) when one of them is new.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2vkern.kernels._table import Column, table_of

CHUNK = 8192
"""elements that a block of threads does"""


def run_chunks(op: str, run: Any, columns: Sequence[Column], settings: Sequence[Any]) -> None:
    """Call the extension's op `run` on the table of the columns, which counts the written ones as changed."""
    with table_of(op, columns, CHUNK, "native") as table:
        kinds = [code for kind in table.kinds for code in kind]
        run(table.data, table.programs, CHUNK, kinds, *settings)


def changed(*lists: list[Tensor]) -> None:
    """Let autograd know that tensors were changed: C++ ops do not say so themselves.

    On CUDA the table does, and what a compiler traces needs no telling.
    """
    if lists[0][0].is_cpu and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensors in lists for tensor in tensors])
